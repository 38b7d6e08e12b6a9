"""The extended interpreter of GPU kernels, and their compiler, as fixtures."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels.topology import compiler_environment, gpu_topology


def _load():
    # `--import-mode=importlib` leaves the folder of a test out of the import path.
    spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def interpreter():
    return _load()


@pytest.fixture
def interpreted(interpreter):
    with interpreter.extended_interpreter() as run:
        yield run


@pytest.fixture
def tpu_races() -> Iterator[Callable[[], bool]]:
    """Say whether the TPU interpreter has seen a race in this test."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
    from jax.experimental.pallas import tpu as pltpu

    pltpu.reset_tpu_interpret_mode_state()
    yield lambda: interpreter.races is not None and interpreter.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def tpu_interpreted(tpu_races) -> Callable[..., Any]:
    """Run a function that interprets TPU kernels, jitted; fail on a race."""

    def run(function: Callable[..., Any], *operands: Any) -> Any:
        out = jax.block_until_ready(jax.jit(function)(*operands))
        assert not tpu_races(), "the interpreter found a race"
        return out

    return run


@pytest.fixture(scope="module")
def compile_for_hopper(tmp_path_factory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Compile problems by name, all in one process of its own."""
    try:
        gpu_topology()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))

    def compile_all(problems: dict[str, Any]) -> dict[str, Any]:
        settings = {"MOSAIC_GPU_DUMP_TO": str(tmp_path_factory.mktemp("mosaic"))}
        settings |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("compile_hopper.py")],
            input=json.dumps(problems),
            env=os.environ | compiler_environment() | settings,
            cwd=Path(__file__).parent.parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return compile_all


def misaligned_copies(ptx: str) -> list[str]:
    """List the offsets in shared memory that tensor copies may not have as target: the device wants multiples of 128.

    Those that are computed while the kernel runs are not seen.
    """
    offsets = dict(re.findall(r"add\.s(?:32|64)\s+(%\w+), %\w+, (\d+);", ptx))
    targets = re.findall(r"cp\.async\.bulk\.tensor\.\w+\.shared::\S+ \[(%\w+)\]", ptx)
    assert targets
    return [offsets[target] for target in targets if int(offsets.get(target, 0)) % 128]


@pytest.fixture(scope="session")
def well_compiled() -> Callable[..., str]:
    """Check what the compiler said of a kernel, and give its PTX."""

    def check(report: dict[str, Any], *, multiplies: bool = True) -> str:
        assert "failure" not in report, report["failure"]
        (ptxas,), (ptx,) = report["ptxas"], report["ptx"]
        assert "sm_90a" in ptxas
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas)
        assert spills
        assert set(spills) == {"0"}, ptxas
        assert "C75" not in ptxas, ptxas  # one wgmma at a time
        assert ("wgmma.mma_async" in ptx) == multiplies
        assert "multimem" not in ptx  # NVLink multicast is not for us
        assert not misaligned_copies(ptx)
        return ptx

    return check
