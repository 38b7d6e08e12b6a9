import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.data import (
    calibration_tokens,
    cut_tokens,
    draw_tokens,
    first_tokens,
    prompt_tokens,
    read_texts,
    sample_tokens,
)
from spear_jax.models.decoder import Decoder
from spear_jax.testing import random_weights, tiny_config


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = tiny_config(
        bos_id=2, eos_ids=(3,), tie_embeddings=False, sliding_window=9, layer_is_global=(True, False, True)
    )
    return Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)


def test_draws_follow_the_distribution():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal(600) * 2, jnp.float32).at[17].set(-jnp.inf)
    drawn = np.asarray(draw_tokens(jnp.broadcast_to(logits, (40_000, 600)), key=jax.random.key(1)))
    found = np.bincount(drawn, minlength=600) / len(drawn)
    wanted = np.asarray(jax.nn.softmax(logits))
    assert found[17] == 0
    assert np.abs(found - wanted).sum() < 0.08  # about sqrt(2 V / (pi n)) expected
    assert np.abs(found - wanted).max() < 5 * np.sqrt(wanted.max() / len(drawn))


def test_cold_sampling_is_greedy_decoding_by_full_forward_passes(model):
    # Near temperature zero each token is the argmax of the cached logits: a wrong cache, mask or position shows.
    tokens = sample_tokens(model, count=4, length=24, key=jax.random.key(3), temperature=1e-4)
    hidden, _ = model(jnp.asarray(tokens))
    greedy = np.asarray(jnp.argmax(model.logits(hidden), axis=-1))
    np.testing.assert_array_equal(tokens[:, 1:], greedy[:, :-1])
    assert len(np.unique(tokens)) > 10


def test_sampling_is_repeatable_and_follows_batches(model):
    args = {"count": 5, "length": 8, "key": jax.random.key(0)}
    tokens = sample_tokens(model, **args, batch_size=2)
    assert tokens.shape == (5, 8)
    np.testing.assert_array_equal(tokens, sample_tokens(model, **args, batch_size=2))
    assert len(np.unique(tokens, axis=0)) == 5


def test_half_of_the_sequences_begin_with_bos(model):
    first = first_tokens(model, count=100, bos_share=0.5, key=jax.random.key(0), exclude=(2, 3))
    assert (first[:, 0] == 2).sum() == 50
    assert not np.isin(first[50:, 0], (2, 3)).any()
    assert (first[:, 1] == -1).all()


@pytest.mark.parametrize("sizes", [{"count": 0, "length": 8}, {"count": 1, "length": 1}, {"count": 1, "length": 9999}])
def test_sizes_that_make_no_sense(model, sizes):
    with pytest.raises(ValueError, match="cannot sample"):
        sample_tokens(model, **sizes, key=jax.random.key(0))


def test_texts_of_all_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    assert read_texts(str(tmp_path / "a.txt")) == ["one text"]
    assert read_texts(str(tmp_path / "b.jsonl")) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', 'string "text"'),
    ],
)
def test_bad_texts_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(str(tmp_path / name))


def test_a_missing_text_is_no_dataset():
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_texts("./missing.txt")


@pytest.fixture
def datasets_folder(tmp_path, monkeypatch):
    """A working directory with folders that `datasets` takes for those of its hub."""
    rows = {
        "org/plain/train.jsonl": [{"text": "one"}, {"text": "two"}],
        "org/plain/test.jsonl": [{"text": "three"}],
        "org/subsets/a.jsonl": [{"text": "in a"}],
        "org/subsets/b.jsonl": [{"text": "in b"}],
        "org/others/train.jsonl": [{"body": "no text"}],
        "org/empty/train.jsonl": [{"text": " "}],
    }
    for name, lines in rows.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "org/subsets/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("org/plain", ["one", "two"]),
        ("org/plain@test", ["three"]),
        ("org/subsets:b", ["in b"]),
        ("org/subsets:a@train", ["in a"]),
    ],
)
@pytest.mark.usefixtures("datasets_folder")
def test_texts_of_a_dataset(source, texts):
    assert read_texts(source) == texts


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/others", 'dataset org/others: rows have no "text" column'),
        ("org/plain@part", "dataset org/plain@part: cannot be read: .*train"),
        ("org/subsets", "dataset org/subsets: cannot be read: Config name is missing"),
        ("org/empty", "org/empty: the calibration text is empty"),
    ],
)
@pytest.mark.usefixtures("datasets_folder")
def test_bad_datasets_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        read_texts(source)


def test_cuts_are_drawn_without_replacement():
    text = np.arange(100)
    rows = cut_tokens(text, count=50, length=7, key=jax.random.key(0))
    assert rows.shape == (14, 7)
    assert sorted(rows[:, 0].tolist()) == list(range(0, 98, 7))
    with pytest.raises(ValueError, match="has 100 tokens, expected at least 128"):
        cut_tokens(text, count=2, length=64, key=jax.random.key(0))


def test_prompts_are_pieces_of_the_text_of_all_lengths():
    rows = prompt_tokens(np.arange(1000, 1300), count=200, longest=8, key=jax.random.key(0))
    assert rows.shape == (200, 9)
    sizes = (rows >= 0).sum(axis=1)
    assert set(sizes) == set(range(1, 9))
    for row, size in zip(rows, sizes, strict=True):
        np.testing.assert_array_equal(row, np.append(row[0] + np.arange(size), [-1] * (9 - size)))
    assert rows[:, 0].min() < 1020 < 1270 < rows[:, 0].max() <= 1292
    with pytest.raises(ValueError, match="up to 8 tokens out of a text of 7"):
        prompt_tokens(np.arange(7), count=1, longest=8, key=jax.random.key(0))


def test_samples_go_on_from_prompts(model, monkeypatch):
    monkeypatch.setattr("calibrate.data._SPAN", 8)
    text = np.random.default_rng(0).integers(4, 60, 500).astype(np.int32)
    key = jax.random.key(3)
    tokens = sample_tokens(model, count=6, length=24, key=key, temperature=1e-4, prompts=text, longest_prompt=5)
    windows = {tuple(text[i : i + 2]) for i in range(499)}
    assert sum(tuple(row[:2]) in windows for row in tokens.tolist()) >= 4  # prompts of one token are followed freely
    hidden, _ = model(jnp.asarray(tokens))
    greedy = np.asarray(jnp.argmax(model.logits(hidden), axis=-1))
    np.testing.assert_array_equal(tokens[:, 5:], greedy[:, 4:-1])


def test_text_and_samples_are_mixed(model):
    settings = {"count": 8, "length": 12, "longest_prompt": 3, "bos_share": 0.5, "key": jax.random.key(1)}
    text = np.random.default_rng(0).integers(4, 60, 200).tolist()
    tokens, sampled = calibration_tokens(model, ["all"], lambda _: text, text_share=0.25, **settings)
    assert tokens.shape == (8, 12)
    assert sampled.sum() == 6
    cuts = {tuple(text[i : i + 12]) for i in range(0, 192, 12)}
    assert [tuple(row) in cuts for row in tokens.tolist()] == (~sampled).tolist()
    whole, sampled = calibration_tokens(model, ["all"], lambda _: text, text_share=1.0, **settings)
    assert not sampled.any()
    assert len(whole) == 8
    alone, sampled = calibration_tokens(model, [], lambda _: [], text_share=1.0, **settings)
    assert sampled.all()
    assert (alone[:, 0] == 2).sum() == 4
