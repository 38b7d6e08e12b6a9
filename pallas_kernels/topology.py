"""Accelerators to compile for on a machine that has none: their compilers run on any CPU (`uv run --group aot`)."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.topologies import TopologyDescription

from pallas_kernels import dispatch

GPUS = {"h200": "topology_h200.txtpb"}
"""Descriptions of GPUs, as XLA's `GpuTargetConfigProto` in text form."""

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Smallest topology of each TPU."""


def gpu_topology(name: str = "h200", *, count: int = 1) -> TopologyDescription:
    """Describe `count` GPUs of one machine; programs for them are compiled, never run.

    The process needs `compiler_environment()` from its start.

    Raises:
        ValueError: No description of such a GPU is known, or `count` is not positive.
        ModuleNotFoundError: A part of the compiler is not installed.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    if count < 1:
        raise ValueError(f"a topology has at least one GPU, got {count}")
    _require("jax_cuda13_plugin", "jax-cuda13-plugin")
    _require("jax_plugins.xla_cuda13", "jax-cuda13-pjrt")
    if _cuda_root() is None:
        raise ModuleNotFoundError("compiling for a GPU needs ptxas, of nvidia-cuda-nvcc: uv run --group aot")
    target = (resources.files("pallas_kernels") / GPUS[name]).read_text(encoding="utf-8")
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")


def tpu_topology(name: str) -> TopologyDescription:
    """Describe the smallest machine with a TPU of this kind, or "v6e:2x4"; programs for it are compiled, never run.

    Raises:
        ValueError: No such TPU is known.
        ModuleNotFoundError: libtpu is not installed.
    """
    kind, _, chips = name.partition(":")
    if kind not in TPUS:
        raise ValueError(f"tpu must be one of {', '.join(TPUS)}, got {kind!r}")
    _require("libtpu", "libtpu")
    return topologies.get_topology_desc(platform="tpu", topology_name=name if chips else TPUS[kind])


@contextlib.contextmanager
def compiling_for_tpu(name: str) -> Iterator[Any]:
    """Trace and compile what is inside for one device of a TPU's smallest machine, which is given.

    Backends and block sizes are chosen for it, and jax knows its generation.

    Raises:
        ValueError: No such TPU is known.
        ModuleNotFoundError: libtpu is not installed.
    """
    device = tpu_topology(name).devices[0]
    abstract = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with dispatch.compiling_for("tpu", kind=device.device_kind), jax.sharding.use_abstract_mesh(mesh):
        yield device


def compiler_environment() -> dict[str, str]:
    """Give the environment in which a new process finds the compilers and looks for no accelerator of its own."""
    found = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Several processes may compile at a time: there is no TPU for them to take from each other.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    if (root := _cuda_root()) is not None:
        found |= {"MOSAIC_GPU_CUDA_ROOT": str(root), "PATH": f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    return found


def _require(module: str, package: str) -> None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ModuleNotFoundError(f"compiling for this accelerator needs {package}: uv run --group aot")


def _cuda_root() -> Path | None:
    """Find the folder of CUDA's compilers among installed packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else spec.submodule_search_locations or []
    roots = (root for place in places for root in sorted(Path(place).glob("*")))
    return next((root for root in roots if (root / "bin" / "ptxas").is_file()), None)
