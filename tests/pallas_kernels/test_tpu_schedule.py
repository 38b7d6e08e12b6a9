"""The cost model of int4_matmul agrees with what libtpu schedules, as far as that says: it knows nothing of memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.int4_matmul.tpu import step_cycles
from pallas_kernels.int4_matmul.tpu_kernel import TpuConfig
from pallas_kernels.topology import compiler_environment
from pallas_kernels.tpus import GENERATIONS

pytestmark = [pytest.mark.aot, pytest.mark.timeout(300)]

SHAPE = {"n": 4096, "k": 4096}
CUTS = [
    (groups, TpuConfig(block_m=m, block_n=bn, block_k=bk, scaled=scaled))
    for groups, m, bn, bk, scaled in [
        (1, 16, 2048, 512, "sums"),
        (1, 16, 512, 2048, "sums"),
        (1, 64, 512, 2048, "sums"),
        (1, 256, 512, 2048, "sums"),
        (32, 16, 512, 1024, "sums"),
        (32, 512, 512, 1024, "weights"),
    ]
]


@pytest.mark.parametrize("tpu", GENERATIONS)
def test_the_model_agrees_with_the_schedule(tpu: str, tmp_path: Path):
    pytest.importorskip("libtpu")
    problems = {
        str(i): SHAPE | {"tpu": tpu, "m": config.block_m, "groups": groups, "config": dataclasses.asdict(config)}
        for i, (groups, config) in enumerate(CUTS)
    }
    dump = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("schedule_tpu.py"), tmp_path],
        input=json.dumps(problems),
        env=os.environ | compiler_environment() | dump,
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout)
    off = {}
    for i, (groups, config) in enumerate(CUTS):
        predicted = step_cycles(config, **SHAPE, groups=groups, rank=0, chip=GENERATIONS[tpu])
        off[f"{groups}x{config.block_m}x{config.block_n}"] = round(predicted / counted[str(i)], 2)
    # With 256 rows the peak of a TPU binds the model, which schedules exceed by up to a third (tpu7x).
    assert 0.85 < off.pop("1x256x512") < 1.35
    assert all(0.85 < ratio < 1.15 for ratio in off.values()), str(off)
