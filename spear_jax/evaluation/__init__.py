"""Measure a language model: perplexity over a text, and zero-shot tasks by log-likelihood."""

from spear_jax.evaluation.perplexity import Perplexity, perplexity
from spear_jax.evaluation.scoring import LanguageModel, sequence_logprobs, token_logprobs
from spear_jax.evaluation.tasks import TASKS, Example, TaskResult, load_examples, run_task
