"""Settings of the whole suite: strict types, quiet accelerators, no network."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of XLA on a CPU, by default one a core. In an interpreted GPU kernel each warpgroup that waits at a barrier
# holds one: with too few, all wait for ever.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")

_MOST_WORKERS = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Spread whole folders over processes, file by file; what names single files runs in this process."""
    if all(Path(name).is_dir() for name in config.args):
        return min(_MOST_WORKERS, os.cpu_count() or 1)
    return 0
