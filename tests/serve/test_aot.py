"""Whole models compile ahead of time; what is refused is said."""

import json
import sys

import jax
import pytest

from pallas_kernels import aot as entry
from pallas_kernels.peer_reduce import empty_inbox
from serve import aot
from serve.aot import AotConfig, compile_steps
from spear_jax.models.quantize import weight_bytes

LLAMA = "configs/models/llama-3.1-8b.yaml"


def run(monkeypatch, capsys, *flags: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["aot", *flags])
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    captured = capsys.readouterr()
    if stopped.value.code:
        return {"error": captured.err}
    return json.loads(captured.out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v1:2x2"], "tpu must be one of v5e, v5p, v6e, tpu7x, got 'v1'"),
        (["--topology", "h200", "--tp", "2"], "tp must be from 1 to the 1 devices of h200, got 2"),
        (["--topology", "h200:2x2"], "N up to 8, got '2x2'"),
        (["--model", "nothing.yaml"], "nothing.yaml does not exist"),
        (["--slot", "3"], "slot"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, flags: list[str], message: str):
    monkeypatch.setattr(aot.os, "environ", dict(aot.os.environ))
    error = run(monkeypatch, capsys, *flags)["error"]
    assert message in error
    assert "Traceback" not in error


def test_no_array_of_a_described_model_is_made():
    config = AotConfig(tp=4)
    model = aot.abstract_model(aot.load_yaml(aot.ModelConfig, LLAMA), config, aot.lay_out_for_tpu)
    layer = model.layer(0)
    assert layer.qkv.weight.shape == (1536, 4096)
    assert layer.down.linear.weight.shape == (4096, 3584)
    assert model.head.shape == (128256 // 4, 4096)
    # A quarter of 3.5 GB of codes, and of 2.1 GB of head and embedding.
    assert 1.4e9 < weight_bytes(model) < 1.45e9


@pytest.mark.aot
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("topology", "tp"),
    [
        ("v5e:2x2", 1),
        ("v5p:2x2x1", 1),
        ("v6e:2x2", 1),
        ("tpu7x:2x2x1", 1),
        ("v6e:2x2", 4),
        ("h200", 1),
        ("h200:1x1x2", 2),
    ],
)
def test_a_model_compiles_with_its_kernels(topology: str, tp: int):
    """Two layers of Llama-3.1-8B: weights come in packed, and nothing as large as one is made on the way."""
    on_gpu = topology.startswith("h200")
    pytest.importorskip("jax_cuda13_plugin" if on_gpu else "libtpu")
    config = AotConfig(topology=topology, tp=tp, layers=2)
    model = aot.abstract_model(
        aot.dataclasses.replace(aot.load_yaml(aot.ModelConfig, LLAMA), num_layers=2),
        config,
        aot.lay_out_for_hopper if on_gpu else aot.lay_out_for_tpu,
    )
    keys = 2 * 16 * 8 * 2432 * 128 * 2 * 2 // tp
    inbox = 0 if tp == 1 else weight_bytes(jax.eval_shape(lambda: empty_inbox(devices=tp, rows=64, columns=4096)))
    for result in compile_steps(config):
        assert result["kernel_calls"] >= 4
        if on_gpu and tp > 1 and result["step"] == "decode":
            # A norm, then in each layer qkv, attention, o with its sum and norm, gate_up, down with its sum and norm.
            assert result["kernel_calls"] == 1 + 2 * 7
        assert result["argument_bytes"] < 1.02 * weight_bytes(model) + keys + inbox
        assert result["temporary_bytes"] < (100 if on_gpu else 48) * 2**20
        assert result["hbm_bytes"] < result["argument_bytes"] + result["temporary_bytes"] + 2**20
        assert result["compiler_flops"] is None or on_gpu or result["compiler_flops"] > 0
        assert result["roofline_ms"] > 0
