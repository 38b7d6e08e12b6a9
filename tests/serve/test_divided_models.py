"""Models divided over eight fake devices answer as whole ones do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "checkpoint", "measures"])
def test_eight_devices_answer_as_one(name: str):
    """Greedy tokens are the same, logits to 1e-3, also of a checkpoint restored onto eight and onto four."""
    root = Path(__file__).parents[2]
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("divided_models.py"), name],
        env=os.environ | settings | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [name]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_demo_on_three_devices_answers_as_on_one(platform: str):
    """Three, because SmolLM2-135M has nine heads and three key heads."""
    root = Path(__file__).parents[2]
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("divided_demo.py"), "8", platform],
        env=os.environ | settings | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["divided"] == report["whole"]
    assert len(set(report["whole"])) > 3
