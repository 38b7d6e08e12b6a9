"""Kernels that write into each other's memory compile for 2, 4 and 8 H200s, and inboxes stay where they are."""

import dataclasses

import pytest

from pallas_kernels.peer_reduce.cases import Case

pytestmark = pytest.mark.aot

CASES = {
    "product": Case(m=1, n=4096, k=2048, rank=16, gated=True, following=16),
    "product, 64 rows": Case(m=64, n=5120, k=1024, rank=16, gated=True),
    "product, static": Case(m=8, n=8192, k=3584, rank=16),
    "product, no compensator": Case(m=32, n=4096, k=1792),
    "parts": Case(m=16, n=4096, rank=16, gated=True, following=16),
    "parts alone": Case(m=1, n=4096),
}
PROBLEMS = {f"{name}, 8 devices": (case, 8) for name, case in CASES.items()}
PROBLEMS |= {
    f"{name}, {devices} devices": (CASES[name], devices) for name in ("product", "parts") for devices in (2, 4)
}


@pytest.fixture(scope="module")
def reports(compile_for_hopper):
    return compile_for_hopper(
        {
            name: {"kind": "peers", "case": dataclasses.asdict(case), "devices": devices}
            for name, (case, devices) in PROBLEMS.items()
        }
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernels_compile_as_they_should(reports, well_compiled, name: str):
    (case, devices), report = PROBLEMS[name], reports[name]
    assert "failure" not in report, report["failure"]
    kernels = {"peer_tail": case.rank > 0 or case.following > 0} | ({"int4_matmul": True} if case.k else {})
    assert len(report["ptx"]) == len(report["ptxas"]) == len(kernels)
    for ptx, ptxas in zip(report["ptx"], report["ptxas"], strict=True):
        (kernel,) = (kernel for kernel in kernels if f"entry {kernel}" in ptx)
        well_compiled({"ptx": [ptx], "ptxas": [ptxas]}, multiplies=kernels[kernel])
        writes = kernel == "int4_matmul" or not case.k
        assert ("st.release.sys" in ptx) == writes
        assert ("ld.acquire.sys" in ptx) == (kernel == "peer_tail")
    # A tail that only waits is launched without the host's threads meeting.
    assert report["meetings"] == 1
    assert not [shape for shape in report["copies"] if f"f32[1,2,{devices}," in shape or f"f32[2,{devices}," in shape]
    assert report["aliased_bytes"] > 2 * devices * max(8, case.m) * case.n * 4
