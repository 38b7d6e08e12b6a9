import importlib.util
import sys

import pytest

from pallas_kernels import topology


def test_unknown_accelerators_are_refused():
    with pytest.raises(ValueError, match="gpu must be one of h200, got 'gtx'"):
        topology.gpu_topology("gtx")
    with pytest.raises(ValueError, match="tpu must be one of v5e, v5p, v6e, tpu7x, got 'v1'"):
        topology.tpu_topology("v1")
    with pytest.raises(ValueError, match="at least one GPU, got 0"):
        topology.gpu_topology(count=0)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("jax_cuda13_plugin", "needs jax-cuda13-plugin: uv run --group aot"),
        ("jax_plugins.xla_cuda13", "needs jax-cuda13-pjrt: uv run --group aot"),
        ("nvidia", "needs ptxas, of nvidia-cuda-nvcc: uv run --group aot"),
    ],
)
def test_a_missing_part_of_the_gpu_compiler_is_named(missing: str, message: str, monkeypatch):
    here = importlib.util.find_spec("sys")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else here)
    with pytest.raises(ModuleNotFoundError, match=message):
        topology.gpu_topology()


def test_a_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs libtpu: uv run --group aot"):
        topology.tpu_topology("v5e")


def test_the_environment_points_at_ptxas(monkeypatch, tmp_path):
    (tmp_path / "nvidia" / "cu99" / "bin").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu99" / "bin" / "ptxas").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    environment = topology.compiler_environment()
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["MOSAIC_GPU_CUDA_ROOT"] == str(tmp_path / "nvidia" / "cu99")
    assert environment["PATH"].startswith(str(tmp_path / "nvidia" / "cu99" / "bin"))
