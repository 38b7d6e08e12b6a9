"""Kernels before a product compile for an H200."""

import dataclasses

import pytest

pytestmark = pytest.mark.aot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A norm of sums, a gated product or rows as they are (`op`), of Llama-3.1-8B's shape unless said otherwise."""

    op: str = "norm"
    m: int = 16
    k: int = 4096
    rank: int = 16
    update: bool = True
    activation: str = "silu"
    a: str = "int8"
    z: str = "bfloat16"


GLU = {"op": "glu", "k": 14336}
PROBLEMS = {
    "norm": Problem(),
    "norm, one row": Problem(m=1),
    "norm, 64 rows": Problem(m=64),
    "norm, alone": Problem(update=False),
    "norm, gated": Problem(z="float32"),
    "norm, rank 64": Problem(rank=64),
    "norm, bfloat16 factors": Problem(a="bfloat16", rank=32),
    "norm, no rank": Problem(rank=0),
    "norm alone, no rank": Problem(rank=0, update=False),
    "norm, 2,048 columns": Problem(k=2048),
    "norm, 3,584 columns": Problem(k=3584),
    "norm, 8,192 columns": Problem(k=8192),
    "norm, 16,384 columns": Problem(k=16384),
    "glu": Problem(**GLU),
    "glu, gelu": Problem(**GLU, activation="gelu_tanh"),
    "glu, gated, one row": Problem(**GLU, m=1, z="float32"),
    "glu, rank 64": Problem(**GLU, rank=64),
    "glu, no rank, 64 rows": Problem(**GLU, rank=0, m=64),
    "glu, 18,944 columns": Problem(op="glu", k=18944),
    "glu, 28,672 columns": Problem(op="glu", k=28672),
    "rows": Problem(op="plain"),
    "rows, gated, rank 64": Problem(op="plain", rank=64, z="float32"),
}


@pytest.fixture(scope="module")
def reports(compile_for_hopper):
    return compile_for_hopper(
        {name: {"kind": "tail"} | dataclasses.asdict(problem) for name, problem in PROBLEMS.items()}
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_compiles_as_it_should(reports, well_compiled, name: str):
    ptx = well_compiled(reports[name], multiplies=PROBLEMS[name].rank > 0)
    assert "griddepcontrol.wait" in ptx
