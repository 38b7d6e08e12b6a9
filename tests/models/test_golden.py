"""Every family against Hugging Face's PyTorch implementation, layer by layer (files made by make_golden.py)."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from spear_jax.models import LoadedModel, gguf, hf, load
from spear_jax.models.decoder import Decoder
from spear_jax.testing import assert_close

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ("llama", "llama3-rope", "mistral", "mistral-window", "qwen2", "qwen3", "gemma3")
TOLERANCE = 1e-4
REAL = {
    "gemma-3-270m": "gemma-3-270m.gguf",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct.gguf",
}


def golden(name: str) -> dict[str, np.ndarray]:
    path = GOLDEN / name / "golden.npz"
    if not path.exists():
        pytest.skip(f"no golden file {path.name} for {name}")
    with np.load(path) as arrays:
        return dict(arrays)


def layer_outputs(model: Decoder, tokens: np.ndarray) -> list[np.ndarray]:
    """Give what enters the first layer and what each layer returns, one layer at a time."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, ropes = model.embedded(jnp.asarray(tokens)), model.ropes(positions)
    outputs = [np.asarray(x)]
    for i, window in enumerate(model.config.windows):
        x, _ = model.layer(i)(x, ropes, layer=i, window=window)
        outputs.append(np.asarray(x))
    return outputs


@pytest.mark.parametrize("config_file", ["config.json", "config_legacy.json"])
@pytest.mark.parametrize("name", TINY)
def test_every_family_agrees_with_transformers_layer_by_layer(name: str, config_file: str, tmp_path: Path) -> None:
    expected = golden(name)
    directory = tmp_path / name
    shutil.copytree(GOLDEN / name, directory)
    (directory / config_file).replace(directory / "config.json")
    config, family = hf.read_config(directory)
    model = Decoder.from_weights(config, hf.read_weights(directory, config, family), dtype=jnp.float32)

    for actual, wanted in zip(layer_outputs(model, expected["tokens"]), expected["hidden"], strict=True):
        assert_close(actual, wanted, relative=TOLERANCE)
    hidden, _ = model(jnp.asarray(expected["tokens"]))
    assert_close(hidden, expected["final_norm"], relative=TOLERANCE)
    assert_close(model.logits(hidden), expected["logits"], relative=TOLERANCE)


def check_real(model: Decoder, expected: dict[str, np.ndarray]) -> None:
    tokens = expected["tokens"][None]
    last = expected["hidden_last"].shape[1]
    outputs = layer_outputs(model, tokens)
    for i, actual in enumerate(outputs):
        assert_close(actual[0, -last:], expected["hidden_last"][i], relative=TOLERANCE)
        assert_close(np.linalg.norm(actual[0], axis=-1), expected["hidden_norm"][i], relative=TOLERANCE)
    hidden = model.final_norm(jnp.asarray(outputs[-1]))
    assert_close(hidden[0, -last:], expected["final_norm_last"], relative=TOLERANCE)
    logits = np.asarray(model.logits(hidden[0, -1]))
    assert_close(logits[expected["logits_top_ids"]], expected["logits_top"], relative=TOLERANCE)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load("demo", dtype="float32")


def test_the_demo_model_agrees_with_transformers_layer_by_layer(demo: LoadedModel) -> None:
    check_real(demo.model, golden("smollm2-135m"))


def test_the_demo_model_answers_a_question_as_transformers_does(demo: LoadedModel) -> None:
    chat = json.loads((GOLDEN / "smollm2-135m" / "chat.json").read_text())
    tokenizer = demo.tokenizer
    assert tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True) == chat["text"]
    prompt = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True, return_dict=False)
    assert prompt == chat["prompt_ids"]

    ids = [*prompt, *chat["greedy_ids"]]
    hidden, _ = demo.model(jnp.asarray([ids[:-1]]))
    choices = np.asarray(jnp.argmax(demo.model.logits(hidden[0, len(prompt) - 1 :]), axis=-1))
    # A margin that float32 sums in another order can turn over would say nothing; the smallest here is 0.08.
    assert min(chat["greedy_margins"]) > 0.01
    assert choices.tolist() == chat["greedy_ids"]
    assert tokenizer.decode(chat["greedy_ids"]) == chat["greedy_text"]
    assert chat["eos_token_id"] in demo.config.eos_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_other_real_models_agree_with_transformers_layer_by_layer(name: str) -> None:
    folder = os.environ.get("SPEAR_JAX_TEST_MODELS")
    if folder is None or not (Path(folder) / REAL[name]).exists():
        pytest.skip(f"needs {REAL[name]} in the folder that SPEAR_JAX_TEST_MODELS names")
    expected = golden(name)
    file = gguf.GGUFFile.open(Path(folder) / REAL[name])
    config, family = gguf.read_config(file)
    weights = gguf.read_weights(file, config, family, dtype=np.dtype(np.float32))
    check_real(Decoder.from_weights(config, weights, dtype=jnp.float32), expected)
