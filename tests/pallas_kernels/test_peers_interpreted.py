"""Kernels that write into each other's memory, interpreted on as many CPU devices, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.peer_reduce.cases import CASES

FAULTS = ("one_row!signal", "product!signal", "one_row!generation", "product!generation", "one_row!place")


def interpret(devices: int, *arguments: str) -> None:
    root = Path(__file__).parents[2]
    settings = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret_peers.py"), *arguments],
        env=os.environ | settings | {"JAX_PLATFORMS": "cpu", "NPROC": "32"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == list(arguments)


@pytest.mark.slow
def test_two_devices_agree_and_a_lost_one_is_named():
    interpret(2, "product", "one_row!signal")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_all_devices_have_the_right_sums(name: str, devices: int):
    interpret(devices, name)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_planted_faults_are_found(devices: int):
    interpret(devices, *FAULTS)
