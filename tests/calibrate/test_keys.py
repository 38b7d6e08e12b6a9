"""A stage is computed again exactly when what it depends on has changed."""

import dataclasses

import pytest

from calibrate.config import CalibrateConfig
from calibrate.keys import stage_keys
from calibrate.workdir import Key

CONFIG = CalibrateConfig(gate="published", joint=("norms",), local_steps=5)


def keys(path, **changes) -> dict[str, Key]:
    return stage_keys(dataclasses.replace(CONFIG, **changes), path, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"length": 256}, "text"),
        ({"quantizer": "rtn"}, "quantize"),
        ({"zero_steps": 3}, "zero-byte"),
        ({"scale_rate": 1.0}, "zero-byte"),
        ({"damage_sequences": 3}, "damage"),
        ({"budget": 0.005}, "initial"),
        ({"latency_aware": True}, "initial"),
        ({"factor_bits": 4}, "initial"),
        ({"local_steps": 0}, "local"),
        ({"local_steps": 6}, "local"),
        ({"steps": 3}, "train"),
        ({"initial": "zero"}, "train"),
        ({"gate_rate": 1.0}, "train"),
        ({"code_rate": 1.0}, None),
        ({"eval_window": 64}, None),
    ],
)
def test_a_change_reaches_its_own_stage_and_those_after_it(tmp_path, changes, first):
    order = ["load", "text", "quantize", "zero-byte", "damage", "initial", "local", "train"]
    before, after = keys(tmp_path), keys(tmp_path, **changes)
    changed = [name for name in order if before[name] != after[name]]
    assert changed == ([] if first is None else order[order.index(first) :])


def test_settings_of_gates_do_not_matter_to_the_static_twin(tmp_path):
    before, after = keys(tmp_path), keys(tmp_path, gate_rate=1.0, gate_hidden=8)
    assert before["initial"] != after["initial"]
    assert before["static train"] == after["static train"] == keys(tmp_path, gate="static")["train"]


def test_patience_matters_wherever_something_is_trained(tmp_path):
    before, after = keys(tmp_path), keys(tmp_path, patience=2)
    assert before["zero-byte"] != after["zero-byte"]


def test_another_file_is_another_model(tmp_path):
    before = keys(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert keys(tmp_path)["load"] != before["load"]
