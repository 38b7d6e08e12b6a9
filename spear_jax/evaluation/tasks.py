"""Zero-shot tasks by log-likelihood: LAMBADA, HellaSwag, ARC-easy, PIQA and WinoGrande.

Prompts and metrics follow EleutherAI's lm-evaluation-harness without examples in the prompt.
"""

import bz2
import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from spear_jax.evaluation.scoring import LanguageModel, ReportProgress, sequence_logprobs

type Metric = Literal["acc", "acc_norm", "perplexity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question: (context, continuation) of each choice, and which is right. A lone choice is to be predicted."""

    choices: tuple[tuple[str, str], ...]
    answer: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark: its file in a folder of local data, its dataset on the hub, and how a row becomes an `Example`.

    `read` turns the text of the local file into rows; `normalize` turns a row of the hub's dataset into such a row.
    """

    file: str
    dataset: tuple[str, str | None, str]
    read: Callable[[str], Iterable[dict[str, Any]]]
    normalize: Callable[[dict[str, Any]], dict[str, Any]]
    example: Callable[[dict[str, Any]], Example]
    metrics: tuple[Metric, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Metrics of a task; `acc` and `acc_norm` are fractions of `examples` and come with a standard error."""

    name: str
    examples: int
    metrics: dict[str, float]


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _hellaswag_lines(text: str) -> list[dict[str, Any]]:
    """Read groups of six lines: context, index of the right ending, four endings."""
    lines = text.rstrip("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(f"expected groups of 6 lines, got {len(lines)} lines")
    return [
        {"context": lines[i], "answer": int(lines[i + 1]), "choices": lines[i + 2 : i + 6]}
        for i in range(0, len(lines), 6)
    ]


def _instructions(word: str) -> Callable[[str], list[dict[str, Any]]]:
    """Read a JSON array whose `instruction` holds the question, `{word}1: ...` and so on, then the answer format."""
    choice = re.compile(rf"\s{word}\d+: ")

    def read(text: str) -> list[dict[str, Any]]:
        rows = []
        for row in json.loads(text):
            body = row["instruction"].split("question: ", 1)[1].rsplit("\n\nAnswer format:", 1)[0]
            question, *choices = choice.split(body)
            answer = int(row["answer"].removeprefix(word.lower())) - 1
            rows.append({"question": question.strip(), "choices": [c.rstrip("\n") for c in choices], "answer": answer})
        return rows

    return read


def _last_word(row: dict[str, Any]) -> Example:
    context, _, word = row["text"].rpartition(" ")
    if not context.strip():
        raise ValueError(f"no context before the last word of {row['text']!r}")
    return Example(choices=((context, f" {word}"),))


def _question(row: dict[str, Any]) -> Example:
    context = f"Question: {row['question']}\nAnswer:"
    return Example(choices=tuple((context, f" {choice}") for choice in row["choices"]), answer=row["answer"])


def _ending(row: dict[str, Any]) -> Example:
    return Example(choices=tuple((row["context"], f" {choice}") for choice in row["choices"]), answer=row["answer"])


def _blank(row: dict[str, Any]) -> Example:
    """Score what follows the blank after each option in turn (partial evaluation, Trinh and Le, arXiv 1806.02847)."""
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError(f"no blank in {row['sentence']!r}")
    choices = tuple((before + row[option], f" {after.strip()}") for option in ("option1", "option2"))
    return Example(choices=choices, answer=int(row["answer"]) - 1)


def _normalize_hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    """Drop the artefacts of WikiHow pages: `[title]` ends a sentence, other brackets say nothing."""

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"context": clean(context), "choices": [clean(e) for e in row["endings"]], "answer": int(row["label"])}


def _normalize_arc(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    answer = choices["label"].index(row["answerKey"])
    return {"question": row["question"], "choices": choices["text"], "answer": answer}


TASKS: dict[str, Task] = {
    "lambada": Task(
        file="lambada_test.jsonl",
        dataset=("EleutherAI/lambada_openai", "default", "test"),
        read=_json_lines,
        normalize=lambda row: row,
        example=_last_word,
        metrics=("acc", "perplexity"),
    ),
    "hellaswag": Task(
        file="hellaswag_val_full.txt.bz2",
        dataset=("Rowan/hellaswag", None, "validation"),
        read=_hellaswag_lines,
        normalize=_normalize_hellaswag,
        example=_ending,
        metrics=("acc", "acc_norm"),
    ),
    "arc_easy": Task(
        file="arc_easy_test.json",
        dataset=("allenai/ai2_arc", "ARC-Easy", "test"),
        read=_instructions("Answer"),
        normalize=_normalize_arc,
        example=_question,
        metrics=("acc", "acc_norm"),
    ),
    "piqa": Task(
        file="piqa_validation.json",
        dataset=("baber/piqa", None, "validation"),
        read=_instructions("Solution"),
        normalize=lambda row: {
            "question": row["goal"],
            "choices": [row["sol1"], row["sol2"]],
            "answer": int(row["label"]),
        },
        example=_question,
        metrics=("acc", "acc_norm"),
    ),
    "winogrande": Task(
        file="winogrande_dev.jsonl",
        dataset=("allenai/winogrande", "winogrande_xl", "validation"),
        read=_json_lines,
        normalize=lambda row: row,
        example=_blank,
        metrics=("acc",),
    ),
}


def find_task(name: str) -> Task:
    """Give a task by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def parse_examples(name: str, text: str) -> list[Example]:
    """Turn the text of a task's local file into examples.

    Raises:
        ValueError: The text is not in the task's format, or has no example.
    """
    task = find_task(name)
    try:
        examples = [task.example(row) for row in task.read(text)]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not in the format of {task.file}: {type(error).__name__}: {error}") from error
    if not examples:
        raise ValueError("no examples")
    for number, example in enumerate(examples, 1):
        if not 0 <= example.answer < len(example.choices):
            raise ValueError(f"example {number}: answer {example.answer + 1} of {len(example.choices)} choices")
    return examples


def load_examples(name: str, *, tasks_dir: Path | None = None, limit: int | None = None) -> list[Example]:
    """Give the first `limit` examples of a task from its file in `tasks_dir`, or from the dataset hub without one.

    Raises:
        ValueError: The task is unknown, its data is malformed, or the hub cannot be reached.
        FileNotFoundError: `tasks_dir` lacks the task's file.
    """
    task = find_task(name)
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1 example, got {limit}")
    if tasks_dir is None:
        rows = load_hub_rows(*task.dataset, instead="--tasks-dir DIR")
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        return [task.example(task.normalize(row)) for row in rows]
    path = tasks_dir / task.file
    if not path.is_file():
        raise FileNotFoundError(f"task {name} needs {path}, which does not exist")
    try:
        data = path.read_bytes()
        text = (bz2.decompress(data) if path.suffix == ".bz2" else data).decode()
        return parse_examples(name, text)[:limit]
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_hub_rows(path: str, name: str | None, split: str, *, instead: str) -> Any:
    """Load a split of a dataset on the Hugging Face hub, or from its local cache.

    Raises:
        ValueError: It cannot be had; says so and names the flag that makes it unnecessary.
    """
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"cannot load {path} from the dataset hub ({reason}); pass {instead}") from error


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], *, bos_id: int | None = None
) -> list[tuple[list[int], int]]:
    """Tokenize each context and continuation as one text; give the ids and how many of them are the continuation's.

    Where the context ends in blanks they count to the continuation, as a token of text begins with its blank.
    """
    split = [
        (context[: len(context.rstrip())], context[len(context.rstrip()) :] + continuation)
        for context, continuation in pairs
    ]
    contexts = tokenizer([context for context, _ in split], add_special_tokens=False)["input_ids"]
    wholes = tokenizer([context + rest for context, rest in split], add_special_tokens=False)["input_ids"]
    prefix = [] if bos_id is None else [bos_id]
    encoded = []
    for context, whole in zip(contexts, wholes, strict=True):
        # A tokenizer may merge across the boundary; at least one token always belongs to the continuation.
        start = min(len(context), len(whole) - 1)
        if start + len(prefix) < 1:
            raise ValueError("an empty context gives nothing to predict from; use BOS")
        encoded.append((prefix + list(whole), len(whole) - start))
    return encoded


def score_pairs(
    model: LanguageModel,
    encoded: Sequence[tuple[Sequence[int], int]],
    *,
    max_length: int,
    batch_tokens: int = 2048,
    progress: ReportProgress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Give ln p(continuation | context), float64, and whether it is what greedy decoding gives, for each pair.

    Pairs go into buckets of similar length, each with one compiled shape of about `batch_tokens` tokens. A pair longer
    than `max_length` loses its left end.

    Raises:
        ValueError: A continuation alone is longer than `max_length`.
    """
    buckets: dict[int, list[int]] = collections.defaultdict(list)
    for index, (ids, continuation) in enumerate(encoded):
        if continuation >= max_length:
            raise ValueError(f"a continuation of {continuation} tokens does not fit the model's {max_length} positions")
        buckets[min(_round_up(len(ids)), max_length)].append(index)
    logprobs = np.zeros(len(encoded), np.float64)
    greedy = np.zeros(len(encoded), np.bool_)
    done = 0
    for length, members in sorted(buckets.items()):
        span = _round_up(max(encoded[index][1] for index in members), smallest=4)
        batch = max(1, batch_tokens // length)
        for start in range(0, len(members), batch):
            indices = members[start : start + batch]
            tokens = np.zeros((batch, length), np.int32)
            mask = np.zeros((batch, length), np.bool_)
            for row, index in enumerate(indices):
                ids, continuation = encoded[index]
                ids = ids[-length:]
                tokens[row, : len(ids)] = ids
                mask[row, len(ids) - continuation : len(ids)] = True
            result = jax.device_get(sequence_logprobs(model, tokens, mask, span=span))
            logprobs[indices] = result[0][: len(indices)]
            greedy[indices] = result[1][: len(indices)]
            done += len(indices)
            if progress:
                progress(done, len(encoded))
    return logprobs, greedy


def run_task(
    model: LanguageModel,
    tokenizer: Any,
    name: str,
    examples: Sequence[Example],
    *,
    max_length: int,
    bos_id: int | None = None,
    batch_tokens: int = 2048,
    progress: ReportProgress | None = None,
) -> TaskResult:
    """Score the examples of a task.

    `acc` takes the choice of highest log-likelihood; `acc_norm` divides it by the bytes of the choice first. A task of
    one choice counts as right when greedy decoding gives the whole continuation, and its `perplexity` is
    exp(-mean ln p(continuation)), a whole continuation counting once.

    Raises:
        ValueError: The task is unknown, there are no examples, or one does not fit `max_length` positions.
    """
    task = find_task(name)
    if not examples:
        raise ValueError(f"task {name}: no examples")
    pairs = [pair for example in examples for pair in example.choices]
    encoded = encode_pairs(tokenizer, pairs, bos_id=bos_id)
    logprobs, greedy = score_pairs(model, encoded, max_length=max_length, batch_tokens=batch_tokens, progress=progress)
    ends = np.cumsum([len(example.choices) for example in examples])[:-1]
    sizes = np.array([len(continuation.removeprefix(" ").encode()) for _, continuation in pairs], np.float64)
    answers = [example.answer for example in examples]
    metrics: dict[str, float] = {}
    if "perplexity" in task.metrics:
        metrics |= _accuracy("acc", greedy)
        metrics["perplexity"] = math.exp(min(-logprobs.mean(), 700.0))
    else:
        for metric, scores in (("acc", logprobs), ("acc_norm", logprobs / np.maximum(sizes, 1.0))):
            if metric in task.metrics:
                chosen = [int(choices.argmax()) for choices in np.split(scores, ends)]
                metrics |= _accuracy(metric, np.equal(chosen, answers))
    return TaskResult(name=name, examples=len(examples), metrics=metrics)


def _accuracy(name: str, right: np.ndarray) -> dict[str, float]:
    """Give the fraction that is right and its standard error, sqrt(p (1 - p) / (n - 1))."""
    fraction = float(right.mean())
    return {name: fraction, f"{name}_stderr": math.sqrt(fraction * (1 - fraction) / max(len(right) - 1, 1))}


def _round_up(length: int, *, smallest: int = 32) -> int:
    """Give the next of 32, 48, 64, 96, 128, 192, ...: few shapes to compile, at most half again of padding."""
    size = smallest
    while size < length:
        if size + size // 2 >= length:
            return size + size // 2
        size *= 2
    return size
