"""Models as a command line names them: sources of `spear_jax.models`, and what a calibration wrote."""

from pathlib import Path

from spear_jax import models
from spear_jax.checkpoint import ShardingOf, is_checkpoint, load_checkpoint
from spear_jax.models import DType, LoadedModel

CHECKPOINT = "checkpoint"
"""Folder of the checkpoint in what a calibration writes."""


def load(source: str, *, dtype: DType = "auto", shardings: ShardingOf | None = None) -> LoadedModel:
    """Load a checkpoint, the output directory of a calibration, or anything that `spear_jax.models.load` takes.

    `shardings` says where arrays of a checkpoint go; other sources go to the first device.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The files are damaged, or of an architecture, a type or a format that is not supported.
    """
    path = find_checkpoint(source)
    return models.load(source, dtype=dtype) if path is None else load_checkpoint(path, dtype=dtype, shardings=shardings)


def find_checkpoint(source: str | Path) -> Path | None:
    """Give the checkpoint that a directory is, or holds as a calibration's output; None where there is none."""
    path = Path(source).expanduser()
    return next((place for place in (path, path / CHECKPOINT) if is_checkpoint(place)), None)
