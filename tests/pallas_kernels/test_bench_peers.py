"""The process that times other libraries, and the one that watches it; PyTorch and a GPU are not needed here."""

import importlib.util
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pallas_kernels import bench_peers

without_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")

CASES = [
    bench_peers.Case(method=method, model="llama-3.1-8b", weight="o", m=m, n=64, k=128)
    for method in ("torch_bf16", "humming_128")
    for m in (1, 16)
]


@pytest.fixture
def stand_in(tmp_path: Path):
    """Makes an interpreter of a shell script that is run in place of Python."""

    def make(script: str) -> str:
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return str(file)

    return make


def test_names_of_libraries_stand_for_their_methods():
    assert bench_peers.methods(["torch", "humming_128", "torch_bf16"]) == [
        "torch_bf16",
        "torch_int4pack_128",
        "humming_128",
    ]
    assert bench_peers.methods([]) == []
    assert bench_peers.methods(list(bench_peers.PEERS)) == list(bench_peers.METHODS) == list(bench_peers._BUILDERS)
    with pytest.raises(ValueError, match="no peer is called 'marlin': expected some of torch, humming, gemlite"):
        bench_peers.methods(["marlin"])


def test_the_process_has_no_jax_in_it():
    code = "import pallas_kernels.bench_peers, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@without_torch
def test_a_library_that_is_missing_is_reported_for_each_case():
    found = list(bench_peers.run(CASES, seconds=60))
    assert [(one["method"], one["m"]) for one in found] == [(case.method, case.m) for case in CASES]
    assert found[0]["failure"] == "torch cannot be used: ModuleNotFoundError: No module named 'torch'"
    assert found[3]["failure"].startswith("humming-kernels cannot be used: ")
    assert all(one["n"] == 64 and one["seconds"] >= 0 for one in found)


def test_a_case_that_takes_too_long_costs_itself_alone(stand_in):
    """The first process answers once and then hangs, as does each of its successors."""
    python = stand_in('echo "{\\"us_in_a_row\\": 3.5, \\"error\\": 0.001}"; exec sleep 60')
    found = list(bench_peers.run(CASES, seconds=0.5, python=python))
    assert [one.get("us_in_a_row") for one in found] == [3.5, None, 3.5, None]
    assert found[1]["failure"] == "took longer than 0.5 s"


def test_a_process_that_ends_says_what_it_said_last(stand_in):
    found = list(bench_peers.run(CASES[:2], seconds=20, python=stand_in("echo one >&2; echo out of luck >&2; exit 3")))
    assert [one["failure"] for one in found] == ["the process ended with 3: out of luck"] * 2


def test_a_case_that_spoils_the_gpu_ends_its_process(stand_in):
    python = stand_in('echo "{\\"failure\\": \\"CUDA error\\", \\"fatal\\": true}"; echo "{\\"us_in_a_row\\": 1}"')
    found = list(bench_peers.run(CASES[:2], seconds=20, python=python))
    assert [one["failure"] for one in found] == ["CUDA error"] * 2


def test_nothing_is_said_of_what_there_was_no_time_for(stand_in):
    python = stand_in("exec sleep 60")
    assert list(bench_peers.run(CASES, seconds=50, python=python, deadline=time.monotonic() + 0.5)) == []
    assert list(bench_peers.run(CASES, seconds=50, python=python, deadline=time.monotonic() - 1)) == []


def test_cases_are_served_with_their_weights_kept(monkeypatch):
    built = []

    def weights(case, seed):
        built.append(case.method)
        if case.method == "humming_128":
            raise RuntimeError("no kernel\nfor this")
        return "weights"

    monkeypatch.setattr(bench_peers, "_prepare", lambda peer, tuning: None)
    monkeypatch.setattr(bench_peers, "_weights", weights)
    monkeypatch.setattr(bench_peers, "_measure", lambda case, built, seed: {"us_in_a_row": 1.0, "error": 0.0})
    out = io.StringIO()
    bench_peers.serve(CASES, out, seed=0, gemlite_tuning="shipped")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line.get("us_in_a_row") for line in lines] == [1.0, 1.0, None, None]
    assert lines[2] == {"failure": "RuntimeError: no kernel for this", "fatal": False}
    assert built == ["torch_bf16", "humming_128", "humming_128"]


def test_an_error_of_the_gpu_is_fatal(monkeypatch):
    def measure(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench_peers, "_prepare", lambda peer, tuning: None)
    monkeypatch.setattr(bench_peers, "_weights", lambda case, seed: None)
    monkeypatch.setattr(bench_peers, "_measure", measure)
    out = io.StringIO()
    bench_peers.serve(CASES, out, seed=0, gemlite_tuning="shipped")
    assert [json.loads(line)["fatal"] for line in out.getvalue().splitlines()] == [True]


@without_torch
def test_versions_of_what_is_missing():
    assert bench_peers.versions()["torch"] == "not installed"
