"""Tuned settings are found, and every shape of the models has some cut."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.hopper import SHARED_BYTES
from pallas_kernels.int4_matmul.gpu import Shape, candidates, choose_config, row_class
from pallas_kernels.int4_matmul.hopper import _Kernel
from pallas_kernels.int4_matmul.plan import HopperConfig

H100 = "nvidia-h100-80gb-hbm3"
SHAPES = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536), (960, 576), (3072, 576)],
    "Gemma-3-270m": [(1024, 640), (256, 640), (640, 1024), (2048, 640), (640, 2048), (1536, 640), (4096, 640)],
    "Qwen2.5-0.5B": [(896, 896), (128, 896), (4864, 896), (896, 4864), (1152, 896), (9728, 896)],
    "Llama-3.1-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096)],
}


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("model", SHAPES)
def test_every_shape_of_a_model_has_a_cut(model: str, group: int):
    for n, k in SHAPES[model]:
        if k % group:
            continue
        groups = 1 if group == -1 else k // group
        for m in (1, 8, 16, 33, 64, 100, 300, 2048):
            rank = 16 if m <= 64 else 0
            for paired in {False, n % 128 == 0}:
                config, source = choose_config(m, n, k, groups=groups, rank=rank, paired=paired, device="none")
                assert source == "rule"
                assert config.tile_m <= max(row_class(m), 64)
                config.check(n=n, k=k, groups=groups, projected=rank > 0, paired=paired)


def test_a_shape_without_a_cut_is_refused():
    with pytest.raises(NotImplementedError, match=r"no configuration fits a weight \[64, 192\] with 2 groups"):
        choose_config(8, 64, 192, groups=2, device="none")


@pytest.mark.parametrize(
    ("kind", "name"), [("NVIDIA H100 80GB HBM3", H100), ("TPU v5 lite", "tpu-v5-lite"), ("AMD EPYC (8) ", "amd-epyc-8")]
)
def test_names_of_devices(kind: str, name: str):
    assert tuning.device_name(kind) == name


def test_this_process_has_a_name():
    assert tuning.device_name() == tuning.device_name(jax.devices()[0].device_kind)


def test_tuned_cuts_fit_and_are_chosen():
    table = tuning.read_table("int4_matmul", H100)
    assert table
    for name, settings in table.items():
        key = {part.split("=")[0]: int(part.split("=")[1]) for part in name.split(",")}
        config = HopperConfig(**settings)
        assert tuning.lookup("int4_matmul", key, device=H100) == settings
        config.check(n=key["n"], k=key["k"], groups=key["groups"])
        shape = {"n": key["n"], "k": key["k"], "groups": key["groups"], "rank": key["rank"]}
        assert any(
            (other.row_tiles, other.k_parts, other.splits) == (config.row_tiles, config.k_parts, config.splits)
            for other in candidates(config.tile_m, Shape(**shape))
        ), f"{name} is not among the candidates"
        assert choose_config(key["tile_m"], device=H100, **shape) == (config, "tuned")


def test_a_rank_without_settings_takes_those_of_rank_0(monkeypatch):
    table = {"k=64,rank=0": {"cut": 0}, "k=64,rank=16": {"cut": 16}}
    monkeypatch.setattr(tuning, "read_table", lambda operation, device: table if device == "here" else {})
    found = {rank: tuning.lookup("op", {"k": 64, "rank": rank}, device="here") for rank in (0, 16, 32)}
    assert found == {0: {"cut": 0}, 16: {"cut": 16}, 32: {"cut": 0}}
    assert tuning.lookup("op", {"k": 128, "rank": 0}, device="here") is None
    assert tuning.lookup("op", {"k": 64, "rank": 0}, device="elsewhere") is None
    assert tuning.lookup("op", {"k": 64}, device="here") is None


def test_what_was_never_tuned_has_no_settings():
    assert tuning.read_table("int4_matmul", "abacus") == {}
    assert tuning.read_table("nothing", H100) == {}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("n", "k"), [(4096, 2048), (4096, 7168), (4096, 14336), (6144, 4096), (5120, 6912)])
def test_what_a_chosen_cut_declares_fits_into_shared_memory(n: int, k: int, wide: bool):
    dtype = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
    for m, device in itertools.product((8, 64, 128, 256, 1024), ("none", H100)):
        config, _ = choose_config(m, n, k, wide=wide, device=device)
        alone = {"groups": 1, "rank": 16, "projected": False, "paired": False}
        kernel = _Kernel(config, n=n, k=k, **alone, out_dtype=dtype, interpret=False)
        shared = kernel.scratch(jax.ShapeDtypeStruct((1, n), jnp.float32), None, jnp.zeros((n, 16), jnp.int8))
        tiles = [ref for ref in shared.values() if hasattr(ref, "dtype")]
        assert sum(math.prod(tile.shape) * jnp.dtype(tile.dtype).itemsize for tile in tiles) < SHARED_BYTES - 1024
