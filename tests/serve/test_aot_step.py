"""What a decode step launches on an H200, and that it copies neither cache nor weights."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.topology import compiler_environment, gpu_topology

pytestmark = pytest.mark.aot

LAYERS = 3
MATMULS = ("qkv", "o", "gate_up", "down")


@pytest.fixture(scope="module", params=[1, 32])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    try:
        gpu_topology()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    root = Path(__file__).parents[2]
    folder = tmp_path_factory.mktemp("xla")
    settings = {"PYTHONPATH": str(root), "XLA_FLAGS": f"--xla_dump_to={folder}"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_step.py"), folder, str(request.param)],
        env=os.environ | compiler_environment() | settings,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"rows": request.param}


@pytest.mark.parametrize("program", ["decode", "greedy", "prefill", "logprobs", "prompt_logprobs", "redraw"])
def test_the_cache_is_written_where_it_is(reports, program: str):
    report = reports[program]
    assert report["aliased_bytes"] >= report["cache_bytes"]
    logits = {"prefill": 1, "prompt_logprobs": 64}.get(program, reports["rows"]) * 128_256 * 4
    assert report["temporary_bytes"] < 4 * logits + 32 * 2**20


@pytest.mark.parametrize("program", ["decode", "greedy"])
def test_a_layer_of_a_decode_step_launches_what_it_must(reports, program: str):
    launched = [name for name in reports[program]["launches"] if " layers/" in name]
    kernels = [name for name in launched if name.startswith("custom-call")]
    count = collections.Counter(name.split("/")[2] for name in kernels)
    assert count == dict.fromkeys((*MATMULS, "paged_decode"), LAYERS) | {"rmsnorm_project": 2 * LAYERS}
    # Once a step: lengths, angles, the embedding, the zeros that the first layer adds to it, the page numbers of all.
    assert len(launched) - len(kernels) <= 5, "\n".join(launched)


@pytest.mark.parametrize("program", ["decode", "greedy"])
def test_a_decode_step_is_one_command_buffer(reports, program: str):
    assert reports[program]["outermost"] == ["kCommandBuffer"]


def test_a_greedy_step_has_no_branch(reports):
    assert "conditional" in " ".join(reports["decode"]["launches"])
    assert "conditional" not in " ".join(reports["greedy"]["launches"])
