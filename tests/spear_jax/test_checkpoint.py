import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from transformers import PreTrainedTokenizerFast

from pallas_kernels.int4_matmul import Gate
from spear_jax import checkpoint
from spear_jax.atomic import MANIFEST, file_checksum
from spear_jax.checkpoint import (
    component_bytes,
    inspect_checkpoint,
    is_checkpoint,
    load_checkpoint,
    named_arrays,
    save_checkpoint,
)
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import expand_model, quantize_model
from spear_jax.quant import CompensatorBank, QuantSpec
from spear_jax.testing import random_weights, tiny_config

PER_CHANNEL = QuantSpec()
RANKS = {"qkv": (1, 0, 2), "down": (0, 3, 0)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 96)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


def make_bank(ranks: tuple[int, ...], n: int, k: int, *, gated: bool, int8: bool = True) -> CompensatorBank:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32)

    total, hidden = sum(ranks), 4
    gate = None
    if gated:
        gate = Gate(
            w_in=draw(total, hidden), b_in=draw(len(ranks), hidden), w_out=draw(total, hidden), b_out=draw(total)
        )
    bank = CompensatorBank(ranks, draw(total, k), draw(total, n), gate=gate)
    return bank.to_int8() if int8 else bank


def make_model(*, spec: QuantSpec = PER_CHANNEL, gated: bool = True, dtype=jnp.float32, **changes) -> Decoder:
    config = tiny_config(**changes)
    model = quantize_model(Decoder.from_weights(config, random_weights(config), dtype=dtype), spec)
    # What a checkpoint holds exactly: embedding and head as bfloat16.
    model.embed = nnx.Param(model.embed[...].astype(jnp.bfloat16).astype(dtype))
    if model.head is not None:
        model.head = nnx.Param(model.head[...].astype(jnp.bfloat16).astype(dtype))
    shapes = config.module_shapes()
    model.compensators = nnx.Dict({name: make_bank(r, *shapes[name], gated=gated) for name, r in RANKS.items()})
    return model


def logits(model: Decoder) -> np.ndarray:
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    return np.asarray(jax.jit(lambda m, t: m.logits(m(t)[0]))(model, tokens))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_checkpoint(path, make_model(), make_tokenizer(), name="tiny", metadata={"quantizer": "rtn", "seed": 3})
    return path


def assert_same_arrays(one: Decoder, two: Decoder) -> None:
    first, second = named_arrays(one), named_arrays(two)
    assert [name for name, _ in first] == [name for name, _ in second]
    for (name, x), (_, y) in zip(first, second, strict=True):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(group_size=32, symmetric=False)], ids=["channel", "group"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "static"])
def test_restores_every_array_bit_for_bit(tmp_path, spec, gated):
    model = make_model(spec=spec, gated=gated, family="qwen2", qkv_bias=True, tie_embeddings=False)
    save_checkpoint(tmp_path / "m", model, make_tokenizer(), name="tiny")
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.config == model.config
    assert loaded.name == "tiny"
    assert loaded.model.compensators["qkv"].ranks == RANKS["qkv"]
    assert_same_arrays(loaded.model, model)
    np.testing.assert_array_equal(logits(loaded.model), logits(model))


def test_factors_of_four_bits_take_half_the_bytes_on_disk_and_come_back(tmp_path):
    found = {}
    for bits in (8, 4):
        model, path = make_model(), tmp_path / str(bits)
        shapes = model.config.module_shapes()
        for name, ranks in RANKS.items():
            model.compensators[name] = make_bank(ranks, *shapes[name], gated=False, int8=False).to_int8(bits=bits)
        save_checkpoint(path, model, make_tokenizer(), name="tiny")
        loaded = load_checkpoint(path).model
        assert_same_arrays(loaded, model)
        assert {bank.bits for bank in loaded.compensators.values()} == {bits}
        np.testing.assert_array_equal(logits(loaded), logits(model))
        found[bits] = inspect_checkpoint(path)[1]["compensator factors"]
        nbytes = sum(bank.nbytes for bank in loaded.compensators.values())
        assert found[bits] == nbytes == component_bytes(model)["compensator factors"]
    scales = 2 * 4 * sum(map(sum, RANKS.values()))
    assert found[4] - scales == (found[8] - scales) // 2


def test_gates_with_further_features_come_back(tmp_path):
    model = make_model()
    shapes, probes = model.config.module_shapes(), 2
    ranks = (2, 0, 1)
    bank = make_bank(ranks, *shapes["o"], gated=False)
    gate = Gate(
        w_in=jnp.ones((3, 4)), b_in=jnp.ones((3, 4)), w_out=jnp.full((3, 4), 0.1), b_out=jnp.ones(3), form="shift",
        probe=jnp.ones((3, probes, shapes["o"][1]), jnp.int8), probe_scale=jnp.full((3, probes), 0.01),
        w_probe=jnp.ones((3, probes, 4)), w_rms=jnp.ones((3, 4)),
    )  # fmt: skip
    bank = CompensatorBank(
        ranks, bank.a[...], bank.bt[...], a_scale=bank.a_scale[...], bt_scale=bank.bt_scale[...], gate=gate
    )
    model = model.replace(compensators=nnx.Dict(o=bank))
    save_checkpoint(tmp_path / "m", model, make_tokenizer(), name="tiny")
    loaded = load_checkpoint(tmp_path / "m").model
    assert loaded.compensators["o"].gate.form == "shift"
    assert_same_arrays(loaded, model)
    np.testing.assert_array_equal(logits(loaded), logits(model))


def test_floating_factors_and_no_compensators(tmp_path):
    model = make_model()
    bank = make_bank((2, 2, 2), *model.config.module_shapes()["o"], gated=False, int8=False)
    for name, banks in {"floating": nnx.Dict(o=bank), "none": nnx.Dict()}.items():
        changed = model.replace(compensators=banks)
        save_checkpoint(tmp_path / name, changed, make_tokenizer(), name="tiny")
        assert_same_arrays(load_checkpoint(tmp_path / name).model, changed)


def test_tokenizer_and_chat_template_come_back(saved):
    tokenizer = load_checkpoint(saved).tokenizer
    assert tokenizer("w5 w7 nothing", add_special_tokens=False)["input_ids"] == [5, 7, 0]
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: hi\n"


def test_metadata_name_format_config_and_tokenizer(saved):
    metadata = ocp.metadata(saved).custom_metadata
    assert metadata["format"] == checkpoint.FORMAT
    assert metadata["config"]["hidden_size"] == 64
    assert "tokenizer.json" in metadata["tokenizer"]
    assert any("m.role" in text for text in metadata["tokenizer"].values())


def test_dtype_casts_activations_and_leaves_scales(saved):
    arrays = dict(named_arrays(load_checkpoint(saved, dtype="bfloat16").model))
    assert arrays["embed"].dtype == jnp.bfloat16
    assert arrays["layers.input_norm.weight"].dtype == jnp.float32
    assert arrays["layers.qkv.weight.scale"].dtype == jnp.float32
    assert arrays["compensators.qkv.a"].dtype == jnp.int8
    with pytest.raises(ValueError, match="dtype 'int4': expected"):
        load_checkpoint(saved, dtype="int4")  # type: ignore[arg-type]


def test_shardings_are_asked_for_by_name(saved):
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    asked = {}

    def shardings(name, shape):
        asked[name] = shape
        return NamedSharding(
            mesh, PartitionSpec(None, "tensor") if name.endswith("qkv.weight.packed") else PartitionSpec()
        )

    model = load_checkpoint(saved, shardings=shardings).model
    assert asked["layers.qkv.weight.packed"] == (3, 128, 32)
    assert dict(named_arrays(model))["layers.qkv.weight.packed"].sharding.spec == PartitionSpec(None, "tensor")


def test_size_on_disk_follows_the_bytes_law(tmp_path):
    model = make_model(hidden_size=512, intermediate_size=1024, vocab_size=2048)
    save_checkpoint(tmp_path / "m", model, make_tokenizer(), name="tiny")
    expected = component_bytes(model)
    config = model.config
    weights = sum(n * k for n, k in config.module_shapes().values()) * config.num_layers
    assert expected["int4 codes"] == weights // 2
    assert expected["embedding"] == 2 * 2048 * 512
    on_disk = sum(f.stat().st_size for f in (tmp_path / "m" / "state").rglob("*") if f.is_file())
    assert on_disk < 1.02 * sum(expected.values()) + 40_000
    info, found = inspect_checkpoint(tmp_path / "m")
    assert found == expected
    assert info.config == config


def test_inspect_tells_what_was_given(saved):
    info, components = inspect_checkpoint(saved)
    assert info.details == {"quantizer": "rtn", "seed": 3}
    assert info.linears["qkv"].groups == 1
    assert info.compensators["down"].ranks == (0, 3, 0)
    assert info.compensators["down"].gate["w_in"].shape == (3, 4)
    bank = sum(bank.nbytes for bank in make_model().compensators.values())
    assert components["compensator factors"] + components["compensator gates"] == bank


def test_refuses_models_that_are_not_int4_or_not_stacked(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(ValueError, match="qkv is not int4"):
        save_checkpoint(tmp_path / "m", expand_model(model, jnp.float32), tokenizer, name="x")
    with pytest.raises(ValueError, match="before unstack"):
        save_checkpoint(tmp_path / "m", unstack(model), tokenizer, name="x")
    with pytest.raises(ValueError, match="written as JSON"):
        save_checkpoint(tmp_path / "m", model, tokenizer, name="x", metadata={"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_overwriting_needs_consent_and_a_checkpoint(saved, tmp_path):
    model, tokenizer = make_model(gated=False), make_tokenizer()
    with pytest.raises(FileExistsError, match="allow overwriting"):
        save_checkpoint(saved, model, tokenizer, name="second")
    save_checkpoint(saved, model, tokenizer, name="second", overwrite=True)
    assert load_checkpoint(saved).name == "second"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not written by spear-jax"):
        save_checkpoint(tmp_path / "precious", model, tokenizer, name="x", overwrite=True)
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", model, tokenizer, name="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "precious"]


def largest_file(path: Path) -> Path:
    return max((f for f in (path / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(path: Path) -> None:
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(path: Path) -> None:
    data = bytearray(largest_file(path).read_bytes())
    data[len(data) // 2] ^= 1
    largest_file(path).write_bytes(data)


def edit_metadata(path: Path, **changes) -> None:
    """Write metadata as another version would have: consistent with the manifest."""
    file = path / "_CHECKPOINT_METADATA"
    values = json.loads(file.read_text())
    values["custom_metadata"] |= changes
    file.write_text(json.dumps(values))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][file.name] = [file.stat().st_size, file_checksum(file)]
    (path / MANIFEST).write_text(json.dumps(manifest))


DAMAGE = {
    "truncated": (truncate, "damaged: state/.* bytes, expected"),
    "flipped byte": (flip_a_byte, "damaged: state/.*checksum"),
    "missing file": (lambda p: largest_file(p).unlink(), "damaged: state/.* is missing"),
    "no arrays": (lambda p: shutil.rmtree(p / "state"), "damaged: state/.* is missing"),
    "cut metadata": (
        lambda p: (p / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {"for'),
        "damaged: _CHECKPOINT_METADATA has",
    ),
    "no metadata": (lambda p: (p / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is missing"),
    "cut manifest": (lambda p: (p / MANIFEST).write_text('{"files": {"sta'), "manifest.json cannot be read"),
    "wrong manifest": (lambda p: (p / MANIFEST).write_text('{"files": ["x"]}'), "manifest.json cannot be read"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "not a spear-jax checkpoint .it has no manifest.json"),
    "newer": (
        lambda p: edit_metadata(p, format=checkpoint.FORMAT + 1, writer="spear_jax 9"),
        "format 3 by spear_jax 9; this version",
    ),
    "no format": (lambda p: edit_metadata(p, format=None), "no format number"),
    "other config": (
        lambda p: edit_metadata(p, config=dataclasses.asdict(tiny_config(hidden_size=96))),
        "compensators.down.bt is .*, expected .* from the configuration",
    ),
    "unknown setting": (
        lambda p: edit_metadata(p, config=dataclasses.asdict(tiny_config()) | {"moe": 8}),
        "unknown key config.moe",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_gives_one_clear_line(saved, kind):
    damage, message = DAMAGE[kind]
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_foreign_and_absent_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a Hugging Face model"):
        load_checkpoint(tmp_path / "hf")
    with pytest.raises(ValueError, match="not a directory"):
        load_checkpoint(tmp_path / "hf" / "config.json")
    ocp.save(tmp_path / "orbax", {"x": jnp.ones(3)})
    with pytest.raises(ValueError, match="not a spear-jax checkpoint"):
        inspect_checkpoint(tmp_path / "orbax")
    assert not is_checkpoint(tmp_path / "orbax")


def test_disk_full_while_writing_leaves_nothing(saved, monkeypatch):
    before = sorted(p.name for p in saved.parent.iterdir())

    def full(path, *args, **kwargs):
        Path(path).mkdir()
        (Path(path) / "half").write_text("half")
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(ocp, "save", full)
    with pytest.raises(OSError, match="disk full while writing"):
        save_checkpoint(saved, make_model(), make_tokenizer(), name="second", overwrite=True)
    assert sorted(p.name for p in saved.parent.iterdir()) == before
    assert load_checkpoint(saved).name == "tiny"


def test_too_little_room_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"needed, 0\.0 MB are free"):
        save_checkpoint(tmp_path / "m", make_model(), make_tokenizer(), name="x")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up(small_disk, monkeypatch):
    model = make_model(hidden_size=512, intermediate_size=2048, vocab_size=4096)
    with pytest.raises(OSError, match=r"disk full: .* are needed"):
        save_checkpoint(small_disk / "m", model, make_tokenizer(), name="x")
    # Another process takes the room after it was checked.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(OSError, match="disk full while writing"):
        save_checkpoint(small_disk / "m", model, make_tokenizer(), name="x")
    assert list(small_disk.iterdir()) == []


WRITER = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec); spec.loader.exec_module(helpers)
from spear_jax.checkpoint import save_checkpoint
model, tokenizer = helpers.make_model(hidden_size=512, vocab_size=8192), helpers.make_tokenizer()
for turn in range(1000):
    print("writing", flush=True)
    save_checkpoint(sys.argv[2], model, tokenizer, name=f"turn {turn}", overwrite=True)
"""


def test_a_killed_writer_leaves_the_old_checkpoint_or_a_whole_new_one(tmp_path):
    path = tmp_path / "m"
    arguments = [sys.executable, "-c", WRITER, __file__, str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
        assert writer.stdout is not None
        # Kills at different moments: the process is stopped, looked at as a killed one would be, and goes on.
        try:
            whole = 0
            for delay in (0.3, 0.02, 0.1, 0.2, 0.05, 0.4):
                assert writer.stdout.readline() == "writing\n"
                time.sleep(delay)
                os.kill(writer.pid, signal.SIGSTOP)
                if path.exists():
                    inspect_checkpoint(path)
                    assert load_checkpoint(path).name.startswith("turn")
                    whole += 1
                os.kill(writer.pid, signal.SIGCONT)
            assert whole
            assert writer.stdout.readline() == "writing\n"
            time.sleep(0.1)
        finally:
            writer.kill()
    # The dead writer's leftovers go with the next write.
    save_checkpoint(path, make_model(), make_tokenizer(), name="after", overwrite=True)
    assert load_checkpoint(path).name == "after"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_killed_between_the_two_renames_gets_the_old_one_back(saved):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    saved.rename(saved.with_name(f".{saved.name}.replaced-{socket.gethostname()}-{dead.pid}"))
    with pytest.raises(FileExistsError, match="allow overwriting"):
        save_checkpoint(saved, make_model(), make_tokenizer(), name="second")
    assert load_checkpoint(saved).name == "tiny"
