import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from calibrate import pipeline
from calibrate.config import QUICK, CalibrateConfig, parse
from calibrate.imported import align
from calibrate.progress import Stages
from spear_jax import loading
from spear_jax.checkpoint import load_checkpoint
from spear_jax.evaluate import EvaluateConfig, evaluate
from spear_jax.models import load
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.quant import QuantSpec, QuantTensor, round_to_nearest
from spear_jax.testing import assert_close

TOKENS = jnp.asarray(np.random.default_rng(1).integers(3, 256, (2, 16)), jnp.int32)
SMALL = CalibrateConfig(
    quantizer="imported", sequences=8, length=16, moment_sequences=8, damage_sequences=1, zero_byte=(), steps=3,
    batch_size=4, save_every=2, budget=0.2, placement="gain", eval_window=32, eval_windows=3, held_out=0.2,
)  # fmt: skip
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def behind_channel_scales(tensors: dict[str, np.ndarray], *, spread: float) -> dict[str, np.ndarray]:
    """Give weights of the same function whose channels are scaled as AWQ does, with scales in powers of two."""
    rng = np.random.default_rng(0)

    def scales(count: int) -> np.ndarray:
        return 2.0 ** np.round(spread * rng.standard_normal(count))

    moved = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    for i in range(3):
        layer = f"model.layers.{i}."
        pairs = {"input_layernorm": "self_attn.{q,k,v}_proj", "post_attention_layernorm": "mlp.{gate,up}_proj"}
        for norm, linears in pairs.items():
            before, _, rest = linears.partition("{")
            middle, _, after = rest.partition("}")
            channel = scales(64)
            moved[f"{layer}{norm}.weight"] /= channel
            for name in middle.split(","):
                moved[f"{layer}{before}{name}{after}.weight"] *= channel
        values, ups = scales(KV_HEADS * HEAD_DIM), scales(96)
        moved[f"{layer}self_attn.v_proj.weight"] /= values[:, None]
        shared = np.repeat(values.reshape(KV_HEADS, HEAD_DIM), HEADS // KV_HEADS, axis=0)
        moved[f"{layer}self_attn.o_proj.weight"] *= shared.reshape(-1)
        moved[f"{layer}mlp.up_proj.weight"] /= ups[:, None]
        moved[f"{layer}mlp.down_proj.weight"] *= ups
    return moved


def write_int4(source: Path, directory: Path, *, spread: float = 0.0, symmetric: bool = True) -> Path:
    """Write a model rounded to nearest, in groups of 32, as compressed-tensors does."""
    shutil.copytree(source, directory)
    tensors = behind_channel_scales(load_file(source / "model.safetensors"), spread=spread)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = round_to_nearest(jnp.asarray(tensors.pop(name)), QuantSpec(group_size=32, symmetric=symmetric))
        tensors[f"{name}_scale"] = np.asarray(weight.scale, np.float32).astype(np.float16)
        tensors[f"{name}_shape"] = np.asarray(weight.shape)
        parts = {f"{name}_packed": np.asarray(weight.codes())}
        if weight.zero is not None:
            parts[f"{name}_zero_point"] = np.asarray(weight.zero).T
        for part, values in parts.items():
            digits = (values.astype(np.int64) + 8).reshape(len(values), -1, 8)
            words = (digits << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)
            tensors[part] = np.ascontiguousarray(words.T if part.endswith("point") else words)
    save_file(tensors, directory / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return directory


def run(config: CalibrateConfig) -> pipeline.Outcome:
    with Stages(Console(stderr=True)) as stages:
        return pipeline.calibrate(config, stages=stages, command=("calibrate",))


def weights_of(model: Decoder) -> dict[str, QuantTensor]:
    return {name: getattr(model.layers, name).weight for name in MODULES}


def assert_same_base(found: Decoder, expected: Decoder) -> None:
    for name, weight in weights_of(expected).items():
        for mine, theirs in zip(jax.tree.leaves(weights_of(found)[name]), jax.tree.leaves(weight), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    for name in ("input_norm", "mlp_norm"):
        gains = [getattr(model.layers, name).weight[...] for model in (found, expected)]
        np.testing.assert_array_equal(gains[0], gains[1])


@pytest.mark.parametrize("symmetric", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compensators_are_trained_on_the_base_as_it_is(symmetric, tiny_source, words, tmp_path, capsys):
    base = write_int4(tiny_source, tmp_path / "base", spread=1.0, symmetric=symmetric)
    config = dataclasses.replace(
        SMALL, model=str(base), reference=str(tiny_source), output=tmp_path / "out", eval_text=(words,)
    )
    outcome = run(config)
    capsys.readouterr()
    assert run(config).result.gaps == outcome.result.gaps
    assert "train: done before" in capsys.readouterr().err
    imported = load(str(base), dtype="float32")
    calibrated = load_checkpoint(outcome.checkpoint, dtype="float32")
    assert_same_base(calibrated.model, imported.model)
    assert calibrated.model.compensators
    # The base in the report is the imported model, and the reference is the one it was made from.
    gap = outcome.result.gaps[0]
    assert [arm.kind for arm in gap.arms] == ["reference", "rtn", "w4", "gated"]
    measured = {
        kind: evaluate(EvaluateConfig(model=str(source), text=words, window=32, max_windows=3))["perplexity"]
        for kind, source in {"reference": tiny_source, "w4": base, "gated": config.output}.items()
    }
    for arm in gap.arms:
        if arm.kind in measured:
            np.testing.assert_allclose(arm.perplexity, measured[arm.kind], rtol=1e-5)
    exact = load(str(tiny_source), dtype="float32").model(TOKENS)[0]
    before, after = (np.linalg.norm(m(TOKENS)[0] - exact) for m in (imported.model, calibrated.model))
    assert after < 0.9 * before
    # Weights behind channel scales put into the reference as it is would do twenty times more damage.
    assert np.max(list(outcome.result.damage.values())) < 0.05
    kind = "symmetric" if symmetric else "asymmetric"
    assert outcome.result.quantizer == f"imported, {kind}, group 32"
    arms = evaluate(
        EvaluateConfig(checkpoint=config.output, compare=True, text=words, window=32, max_windows=3, batch_size=1)
    )["arms"]
    np.testing.assert_allclose(arms["reference"]["perplexity"], measured["reference"], rtol=1e-5)


def test_an_aligned_reference_is_the_same_function_near_the_base(tiny_source, tmp_path):
    base = load(str(write_int4(tiny_source, tmp_path / "base", spread=1.0)), dtype="float32").model
    exact = load(str(tiny_source), dtype="float32").model
    aligned = align(exact, base, source="tiny")
    assert_close(aligned.model(TOKENS)[0], exact(TOKENS)[0], relative=1e-5)
    for name in ("input_norm", "mlp_norm"):
        found, expected = (getattr(model.layers, name).weight[...] for model in (aligned.model, base))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name, weight in weights_of(base).items():
        near, far = (
            float(jnp.linalg.norm(getattr(m.layers, name).weight[...] - weight.dequantize()) / jnp.linalg.norm(
                weight.dequantize()))
            for m in (aligned.model, exact)
        )  # fmt: skip
        assert near < 0.2, name
        assert far > 0.4, name
    # Moments of the inputs follow: of x / c, where the weights' columns were multiplied by c.
    moments = {name: jnp.ones((3, c.shape[1], c.shape[1])) for name, c in aligned.channels.items()}
    for name, moment in aligned.moments(moments).items():
        np.testing.assert_allclose(
            jnp.diagonal(moment, axis1=1, axis2=2) * jnp.square(aligned.channels[name]), 1, rtol=1e-5
        )


def test_without_channel_scales_the_reference_stays_as_it_is(tiny_source, tmp_path):
    base = load(str(write_int4(tiny_source, tmp_path / "base")), dtype="float32").model
    exact = load(str(tiny_source), dtype="float32").model
    aligned = align(exact, base, source="tiny")
    for name in MODULES:
        np.testing.assert_array_equal(
            getattr(aligned.model.layers, name).weight[...], getattr(exact.layers, name).weight[...]
        )


def test_mistakes_are_one_clear_error(tiny_source, words, tmp_path):
    base = write_int4(tiny_source, tmp_path / "base")
    other = tmp_path / "other"
    shutil.copytree(tiny_source, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.2.mlp.gate_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    save_file(tensors, other / "model.safetensors")
    config = dataclasses.replace(SMALL, output=tmp_path / "out", eval_text=(words,))
    for changes, message in [
        (
            {"model": str(base), "quantizer": "rtn"},
            r"is an int4 checkpoint \(compressed-tensors\): name .* --reference",
        ),
        ({"model": str(tiny_source), "reference": str(tiny_source)}, "is not int4 and is its own reference"),
        ({"model": str(base), "reference": str(base)}, "is int4 itself"),
        ({"model": str(base), "reference": str(other)}, "is not what .* made from: gate_up of layer 2 differs by"),
        ({"model": str(base), "reference": str(tiny_source), "group_size": 64}, "leave out --group-size"),
        ({"model": str(base), "reference": str(tiny_source), "asymmetric": True}, "leave out --group-size"),
        ({"model": str(base), "reference": str(tmp_path / "none")}, "none: no such file"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(dataclasses.replace(config, **changes))


def test_a_reference_sets_what_an_imported_base_needs(tmp_path):
    config = parse(["--model", "a", "--reference", "b", "--quick"])
    assert (config.quantizer, config.zero_byte, config.joint) == ("imported", (), ())
    assert config.steps == QUICK["steps"]
    assert config.quick
    assert parse(["--model", "a", "--reference", "b", "--zero-byte", "norms"]).zero_byte == ("norms",)
    path = tmp_path / "a.yaml"
    path.write_text("model: a\nreference: b\njoint: [scales]\n")
    config = parse([str(path)])
    assert (config.quantizer, config.zero_byte, config.joint) == ("imported", (), ("scales",))
    for arguments, message in [
        (["--model", "a", "--reference", "b", "--quantizer", "gptq"], "quantizer gptq: with --reference"),
        (["--model", "a", "--quantizer", "imported"], "quantizer imported needs --reference"),
        (["--model", "a", "--reference", "b", "--joint", "codes"], "codes would round an imported base again"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(arguments)


def test_a_quantized_model_is_evaluated_as_it_is_and_not_rounded_again(tiny_source, words, tmp_path):
    base = write_int4(tiny_source, tmp_path / "base")
    model = loading.load(str(base), dtype="float32").model
    assert all(isinstance(weight, QuantTensor) for weight in weights_of(model).values())
    settings = EvaluateConfig(model=str(base), text=words, window=32, max_windows=3)
    assert evaluate(settings)["bits"] == pytest.approx(4.5)
    with pytest.raises(ValueError, match="int4 already"):
        evaluate(dataclasses.replace(settings, quantize="rtn"))
