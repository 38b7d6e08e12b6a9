"""Paged attention compiles for an H200."""

import dataclasses
from typing import Any

import pytest

from pallas_kernels.paged_attention.gpu import candidates

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
    kind: str = "attention"
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
CLUSTER = {"parts": 1, "splits": 8, "cluster": True, "stages": 4}
PROBLEMS |= {
    "cluster of eight": Problem(sequences=1, config=CLUSTER),
    "cluster of four, 16 rows, int8": Problem(group=12, kv_dtype="int8", config=CLUSTER | {"splits": 4, "stages": 2}),
    "cluster of two, heads of 64": Problem(head_dim=64, config=CLUSTER | {"parts": 2, "splits": 2}),
    "cluster of two, heads of 192": Problem(head_dim=192, kv_heads=1, config=CLUSTER | {"splits": 2, "stages": 2}),
}
APPENDING = {
    "appending, cluster of eight": Problem(sequences=1, page=64, entries=32, config=CLUSTER),
    "appending, cluster of four, groups of seven": Problem(
        group=7, kv_heads=8, page=64, entries=32, config={"parts": 2, "splits": 4, "cluster": True, "stages": 2}
    ),
    "appending": Problem(page=64, entries=128),
    "appending, one sequence": Problem(sequences=1, page=64, entries=128),
    "appending, groups of seven": Problem(group=7, kv_heads=4, page=64, entries=128),
    "appending, heads of 256": Problem(head_dim=256, kv_heads=4, page=64, entries=128),
    "appending, pages of 16": Problem(config={"parts": 2, "splits": 2, "stages": 4}),
}
PROBLEMS |= {name: dataclasses.replace(problem, kind="decode") for name, problem in APPENDING.items()}
PROBLEMS |= {f"chunk, {kind}": Problem(sequences=2, tokens=256, kv_dtype=kind) for kind in ("int8", "float8_e4m3fn")}
PROBLEMS |= {
    f"candidate {config}": Problem(config=dataclasses.asdict(config))
    for config in candidates(4, head_dim=128, capacity=8192, kv_bytes=2)
    if config.splits in (1, 2) and config.stages > 2
}


@pytest.fixture(scope="module")
def reports(compile_for_hopper):
    return compile_for_hopper({name: dataclasses.asdict(problem) for name, problem in PROBLEMS.items()})


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_compiles_as_it_should(reports, well_compiled, name: str):
    ptx = well_compiled(reports[name])
    assert "griddepcontrol.wait" in ptx


@pytest.mark.parametrize("name", APPENDING)
def test_pages_are_written_where_they_are(reports, name: str):
    problem = PROBLEMS[name]
    pages = problem.sequences * problem.entries * problem.kv_heads * problem.page * problem.head_dim * 2
    assert "failure" not in reports[name], reports[name]["failure"]
    assert reports[name]["temporary_bytes"] < pages / 2
