import bz2
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.evaluation import TASKS, Example, load_examples, run_task, sequence_logprobs
from spear_jax.evaluation.tasks import encode_pairs, parse_examples, score_pairs
from spear_jax.models.decoder import Decoder
from spear_jax.testing import random_weights, shared_data, tiny_config

SAMPLES = {
    "lambada": (
        '{"text": "He took the long road home"}\n{"text": "One\\n\\nmore \\"word"}\n{"text": "a b"}\n',
        [(("He took the long road", " home"),), (("One\n\nmore", ' "word'),), (("a", " b"),)],
        [0, 0, 0],
    ),
    "hellaswag": (
        "Cooking: A man. he\n3\nruns.\nis.\nhas.\nstirs.\n",
        [tuple(("Cooking: A man. he", f" {e}") for e in ("runs.", "is.", "has.", "stirs."))],
        [3],
    ),
    "arc_easy": (
        json.dumps(
            [
                {
                    "instruction": "Please choose the correct answer to the question: Which?\n\nAnswer1: a b "
                    "Answer2: c Answer3: d e\n\nAnswer format: answer1/answer2/answer3",
                    "answer": "answer2",
                }
            ]
        ),
        [tuple(("Question: Which?\nAnswer:", f" {a}") for a in ("a b", "c", "d e"))],
        [1],
    ),
    "piqa": (
        json.dumps(
            [
                {
                    "instruction": "Please choose the correct solution to the question: dresser\n\nSolution1: pin \n\n"
                    "Solution2: wood\n\nAnswer format: solution1/solution2",
                    "answer": "solution2",
                }
            ]
        ),
        [(("Question: dresser\nAnswer:", " pin "), ("Question: dresser\nAnswer:", " wood"))],
        [1],
    ),
    "winogrande": (
        '{"sentence": "Ann met Eve so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "2"}\n',
        [(("Ann met Eve so Ann", " was glad."), ("Ann met Eve so Eve", " was glad."))],
        [1],
    ),
}


class Letters:
    """A tokenizer of one token a letter (code modulo 96), but "ab" is one token, so that a boundary can vanish."""

    def __call__(self, texts, *, add_special_tokens=True):
        del add_special_tokens
        return {"input_ids": [[ord(c) % 96 for c in text.replace("ab", "\x01")] for text in texts]}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Repeater:
    """A language model that expects each token again, with the logit `strength`."""

    strength: float = 4.0

    def __call__(self, tokens, positions):
        return jax.nn.one_hot(tokens, 96), None

    def logits(self, hidden):
        return self.strength * hidden.astype(jnp.float32)


@pytest.mark.parametrize("name", TASKS)
def test_local_formats(name, tmp_path):
    text, choices, answers = SAMPLES[name]
    data = text.encode()
    path = tmp_path / TASKS[name].file
    path.write_bytes(bz2.compress(data) if path.suffix == ".bz2" else data)
    examples = load_examples(name, tasks_dir=tmp_path)
    assert [e.choices for e in examples] == choices
    assert [e.answer for e in examples] == answers
    assert len(load_examples(name, tasks_dir=tmp_path, limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("lambada", {"text": "a b"}),
        (
            "hellaswag",
            {
                "activity_label": "Cooking",
                "ctx_a": "A man. [substeps] Hot.",
                "ctx_b": "he",
                "endings": ["runs [title] off."],
                "label": "0",
            },
        ),
        ("arc_easy", {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}),
        ("piqa", {"goal": "Which?", "sol1": "x", "sol2": "y", "label": 1}),
        ("winogrande", {"sentence": "So _ was.", "option1": "x", "option2": "y", "answer": "2"}),
    ],
)
def test_rows_of_the_hub(name, row, monkeypatch):
    import datasets

    def load_dataset(path, config, *, split):
        assert (path, config, split) == TASKS[name].dataset
        return datasets.Dataset.from_list([row, row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = load_examples(name, limit=1)
    expected = {
        "lambada": ((("a", " b"),), 0),
        "hellaswag": ((("Cooking: A man. Hot. He", " runs. off."),), 0),
        "arc_easy": (tuple(("Question: Which?\nAnswer:", f" {c}") for c in "xy"), 1),
        "piqa": (tuple(("Question: Which?\nAnswer:", f" {c}") for c in "xy"), 1),
        "winogrande": ((("So x", " was."), ("So y", " was.")), 1),
    }
    assert (example.choices, example.answer) == expected[name]


def test_an_unreachable_hub_is_one_line_that_names_the_flag(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"baber/piqa .*no route\); pass --tasks-dir DIR"):
        load_examples("piqa")


def test_bad_task_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown task 'mmlu'; known: lambada"):
        load_examples("mmlu", tasks_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"piqa needs .*piqa_validation.json"):
        load_examples("piqa", tasks_dir=tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1 example, got 0"):
        load_examples("piqa", tasks_dir=tmp_path, limit=0)
    (tmp_path / "hellaswag_val_full.txt.bz2").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"hellaswag_val_full.txt.bz2: Invalid data stream"):
        load_examples("hellaswag", tasks_dir=tmp_path)
    for name, text, message in [
        ("hellaswag", "a\n0\nb\n", "groups of 6 lines, got 3"),
        ("lambada", '{"words": 1}', "KeyError: 'text'"),
        ("lambada", "", "no examples"),
        ("lambada", '{"text": "alone"}', "no context"),
        ("piqa", "[{", "JSONDecodeError"),
        ("winogrande", SAMPLES["winogrande"][0].replace('"2"', '"3"'), "answer 3 of 2 choices"),
        ("winogrande", SAMPLES["winogrande"][0].replace("_", ""), "no blank"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_examples(name, text)


def test_pairs_are_tokenized_as_one_text():
    (plain, merged, spaced, bos) = [
        encode_pairs(Letters(), [pair], bos_id=bos_id)[0]
        for pair, bos_id in [(("xy", " z"), None), (("xa", "b"), None), (("xy ", "z"), None), (("xy", " z"), 9)]
    ]
    x, y, z, blank = (ord(c) % 96 for c in "xyz ")
    assert plain == ([x, y, blank, z], 2)
    assert merged == ([x, 1], 1)  # "xa" is two tokens and "xab" is two: the second counts to the continuation
    assert spaced == ([x, y, blank, z], 2)
    assert bos == ([9, x, y, blank, z], 2)
    with pytest.raises(ValueError, match="use BOS"):
        encode_pairs(Letters(), [("", "z")])


def test_scores_do_not_depend_on_the_bucket():
    config = tiny_config()
    model = Decoder.from_weights(config, random_weights(config), dtype=np.float32)
    rng = np.random.default_rng(3)
    sizes = [(5, 2), (31, 9), (33, 1), (40, 12), (6, 5)]
    encoded = [(rng.integers(0, 96, size).tolist(), tail) for size, tail in sizes]
    tokens, mask = np.zeros((5, 48), np.int32), np.zeros((5, 48), np.bool_)
    for row, (ids, tail) in enumerate(encoded):
        tokens[row, : len(ids)] = ids
        mask[row, len(ids) - tail : len(ids)] = True
    expected, _ = sequence_logprobs(model, tokens, mask)
    steps = []
    scores, _ = score_pairs(model, encoded, max_length=256, batch_tokens=64, progress=lambda *step: steps.append(step))
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    # Two rows of 32 tokens fit a batch, one row of 48.
    assert steps == [(2, 5), (3, 5), (4, 5), (5, 5)]
    # What does not fit loses its left end.
    longer = (rng.integers(0, 96, 20).tolist() + encoded[3][0], 12)
    cut, _ = score_pairs(model, [longer], max_length=40)
    np.testing.assert_allclose(cut, expected[3:4], rtol=1e-5)
    with pytest.raises(ValueError, match=r"12 tokens does not fit the model's 12 positions"):
        score_pairs(model, encoded, max_length=12)


def test_metrics():
    hit = -math.log1p(95 * math.exp(-4.0))
    miss = hit - 4.0
    # A repeated letter is likely: 3 hits of 4 tokens beat 1 miss of 1 only when divided by the length.
    example = Example(choices=(("x", "xxxy"), ("x", "y")), answer=0)
    other = Example(choices=(("x", "y"), ("x", "x")), answer=1)
    result = run_task(Repeater(), Letters(), "piqa", [example, other], max_length=64)
    assert 3 * hit + miss < miss < (3 * hit + miss) / 4
    assert result.metrics["acc"] == 0.5
    assert result.metrics["acc_norm"] == 1.0
    assert result.metrics["acc_stderr"] == pytest.approx(0.5)
    assert result.metrics["acc_norm_stderr"] == 0.0

    words = [Example(choices=(("x", "xx"),)), Example(choices=(("x", "xy"),))]
    result = run_task(Repeater(), Letters(), "lambada", words, max_length=64)
    assert result.metrics["acc"] == 0.5
    assert result.metrics["perplexity"] == pytest.approx(math.exp(-(2 * hit + hit + miss) / 2), rel=1e-5)
    assert result.examples == 2

    result = run_task(Repeater(), Letters(), "winogrande", [other], max_length=64)
    assert set(result.metrics) == {"acc", "acc_stderr"}
    with pytest.raises(ValueError, match="no examples"):
        run_task(Repeater(), Letters(), "piqa", [], max_length=64)


def test_the_real_files_parse_whole():
    folder = shared_data("tasks")
    sizes = {name: len(load_examples(name, tasks_dir=folder)) for name in TASKS}
    assert sizes == {"lambada": 5153, "hellaswag": 10042, "arc_easy": 2376, "piqa": 1838, "winogrande": 1267}
