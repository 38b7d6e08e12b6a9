"""Training, and checkpoints, shared by processes: as one process does it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spear_jax.hosts import check_processes

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.parametrize("given", [(None, 2, None), ("auto", None, 0), ("h:1", 2, None), ("h:1", 2, 2), ("h:1", 2, -1)])
def test_settings_of_processes_that_do_not_fit(given: tuple) -> None:
    with pytest.raises(ValueError, match="process_id"):
        check_processes(*given)


def run(count: int, folder: Path) -> list[list[float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "JAX_PLATFORMS": "cpu"}
    folder.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, meeting, str(count), str(index), folder],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(said[0][0].splitlines()[-1])


@pytest.mark.slow
def test_two_processes_train_as_one_and_share_checkpoints(tmp_path: Path) -> None:
    one, two = run(1, tmp_path / "one"), run(2, tmp_path / "two")
    assert one[-1][1] < one[0][1]
    np.testing.assert_allclose(two, one, rtol=1e-3)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"alike", "spread"}
