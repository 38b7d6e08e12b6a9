"""Paged attention compiles for an H200; run as a script, this file is the process that compiles."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention.gpu import candidates, paged_attention_mosaic_gpu
from pallas_kernels.paged_attention.plan import HopperConfig
from pallas_kernels.topology import compiler_environment, gpu_topology

pytestmark = pytest.mark.aot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Sequences of Llama-3.1-8B's shape, unless said otherwise; `config` None leaves the choice to the rule."""

    sequences: int = 32
    kv_heads: int = 8
    group: int = 4
    tokens: int = 1
    head_dim: int = 128
    page: int = 16
    entries: int = 512
    kv_dtype: str = "bfloat16"
    windowed: bool = False
    config: dict[str, Any] | None = None


PROBLEMS = {
    "decode": Problem(),
    "one sequence": Problem(sequences=1),
    "one head a group": Problem(group=1),
    "groups of seven": Problem(group=7, kv_heads=4),
    "pages of 64": Problem(page=64, entries=128),
    "pages of 128": Problem(page=128, entries=64),
    "heads of 64": Problem(head_dim=64),
    "heads of 256": Problem(head_dim=256, kv_heads=1),
    "heads of 256, one sequence": Problem(head_dim=256, kv_heads=1, sequences=1, windowed=True),
    "window": Problem(windowed=True),
    "int8": Problem(kv_dtype="int8"),
    "int8, one sequence": Problem(kv_dtype="int8", sequences=1),
    "fp8": Problem(kv_dtype="float8_e4m3fn"),
    "fp8, window, split": Problem(
        kv_dtype="float8_e4m3fn", windowed=True, config={"parts": 2, "splits": 8, "stages": 6}
    ),
    "chunk": Problem(sequences=2, tokens=256),
    "chunk, window": Problem(sequences=2, tokens=256, windowed=True),
    "chunk, split": Problem(sequences=1, tokens=64),
}
PROBLEMS |= {f"chunk, {kind}": Problem(sequences=2, tokens=256, kv_dtype=kind) for kind in ("int8", "float8_e4m3fn")}
PROBLEMS |= {
    f"candidate {config}": Problem(config=dataclasses.asdict(config))
    for config in candidates(4, head_dim=128, capacity=8192, kv_bytes=2)
    if config.splits in (1, 2) and config.stages > 2
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Compile everything in one process of its own: dumps are set up at its start."""
    try:
        gpu_topology()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    settings = {"MOSAIC_GPU_DUMP_TO": str(tmp_path_factory.mktemp("mosaic"))}
    settings |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | compiler_environment() | settings,
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_compiles_as_it_should(reports, name: str):
    report = reports[name]
    assert "failure" not in report, report["failure"]
    (ptxas,), (ptx,) = report["ptxas"], report["ptx"]
    assert "sm_90a" in ptxas
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas)
    assert spills
    assert set(spills) == {"0"}, ptxas
    assert "C75" not in ptxas, ptxas  # one wgmma at a time
    assert "wgmma.mma_async" in ptx
    assert "griddepcontrol.wait" in ptx
    assert "multimem" not in ptx  # NVLink multicast is not for us


def compile_problem(problem: Problem, dumps: Path) -> dict[str, list[str]]:
    sharding = jax.sharding.SingleDeviceSharding(gpu_topology().devices[0])

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    b, pool = problem.sequences, problem.sequences * problem.entries
    pages = array((pool, problem.kv_heads, problem.page, problem.head_dim), jnp.dtype(problem.kv_dtype))
    scales = array(pages.shape[:3], jnp.float32) if pages.dtype.itemsize == 1 else None
    q = array((b, problem.tokens, problem.kv_heads * problem.group, problem.head_dim), jnp.bfloat16)
    places = array((b,), jnp.int32)
    window = array((), jnp.int32) if problem.windowed else None
    operands = (q, pages, pages, scales, scales, array((b, problem.entries), jnp.int32), places, places, window)
    config = None if problem.config is None else HopperConfig(**problem.config)
    before = set(dumps.iterdir())
    run = jax.jit(lambda *operands: paged_attention_mosaic_gpu(*operands, scale=0.1, config=config))
    run.lower(*operands).compile()
    texts = {path: path.read_text(errors="replace") for path in set(dumps.iterdir()) - before}
    return {kind: [text for path, text in texts.items() if path.suffix == f".{kind}"] for kind in ("ptxas", "ptx")}


def main() -> None:
    reports: dict[str, Any] = {}
    for name, problem in PROBLEMS.items():
        try:
            reports[name] = compile_problem(problem, Path(os.environ["MOSAIC_GPU_DUMP_TO"]))
        except Exception as failure:
            reports[name] = {"failure": f"{type(failure).__name__}: {str(failure)[:2000]}"}
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
