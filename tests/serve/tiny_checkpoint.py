"""Write a checkpoint of a tiny compensated model whose tokens are words: a process of its own, given the path."""

import sys

from divided_models import SIZES, compensated
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spear_jax.checkpoint import save_checkpoint
from spear_jax.testing import tiny_config

if __name__ == "__main__":
    config = tiny_config(**SIZES)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_checkpoint(
        sys.argv[1], compensated(config), PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0"), name="tiny"
    )
