"""The extended interpreter of GPU kernels, as a fixture."""

import importlib.util
from pathlib import Path

import pytest


def _load():
    # `--import-mode=importlib` leaves the folder of a test out of the import path.
    spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def interpreter():
    return _load()


@pytest.fixture
def interpreted(interpreter):
    with interpreter.extended_interpreter() as run:
        yield run
