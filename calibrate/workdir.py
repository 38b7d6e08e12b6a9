"""Finished stages and the state of training, kept so that a run that was killed goes on where it was."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from spear_jax.atomic import writing_file

_FORMAT = 2
"""Part of every key: raised when what a stage writes changes its meaning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """What a stage's result depends on: the settings of the stage and, through the digest, of all before it."""

    digest: str

    @classmethod
    def first(cls, **settings: Any) -> "Key":
        """Give the key of a first stage."""
        return cls(digest="").then(format=_FORMAT, **settings)

    def then(self, **settings: Any) -> "Key":
        """Give the key of a stage that builds on this one; settings are JSON values."""
        text = json.dumps([self.digest, settings], sort_keys=True, allow_nan=False)
        return Key(digest=hashlib.sha256(text.encode()).hexdigest()[:16])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """The arrays and the JSON values of a stage."""

    arrays: dict[str, np.ndarray]
    values: dict[str, Any]

    def tree(self, like: Any, *, prefix: str = "") -> Any:
        """Give a pytree of the arrays, with the structure of `like`.

        Raises:
            ValueError: An array is missing or has another shape.
        """
        paths, structure = jax.tree_util.tree_flatten_with_path(like)
        leaves = []
        for path, leaf in paths:
            name = prefix + _name(path)
            found = self.arrays.get(name)
            if found is None or found.shape != leaf.shape or found.dtype != leaf.dtype:
                raise ValueError(f"saved state does not fit: {name}; delete the work directory")
            leaves.append(jnp.asarray(found))
        return jax.tree.unflatten(structure, leaves)


class WorkDirectory:
    """A folder of npz files, one a stage and key; every file is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, stage: str, key: Key) -> Saved | None:
        """Read what a stage saved under a key; None where there is nothing.

        Raises:
            ValueError: The file is damaged.
        """
        file = self._file(stage, key)
        if not file.exists():
            return None
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                values = json.loads(str(stored["values"]))
                arrays = {
                    name: _restored(stored[f"array.{name}"], dtype) for name, dtype in values.pop("dtypes").items()
                }
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: damaged ({type(error).__name__}): delete it to compute it again") from None
        return Saved(arrays=arrays, values=values)

    def save(self, stage: str, key: Key, arrays: Any, **values: Any) -> None:
        """Write a pytree of arrays, and JSON values, in one step.

        Raises:
            OSError: The disk is full; what was saved before stays.
        """
        named = {_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)}
        values["dtypes"] = {name: array.dtype.name for name, array in named.items()}
        stored = {f"array.{name}": _storable(array) for name, array in named.items()}
        with writing_file(self._file(stage, key)) as stream:
            np.savez(stream, allow_pickle=False, values=np.asarray(json.dumps(values)), **stored)

    def remove(self, stage: str, key: Key) -> None:
        """Forget what a stage saved."""
        self._file(stage, key).unlink(missing_ok=True)

    def _file(self, stage: str, key: Key) -> Path:
        return self.path / f"{stage.replace(' ', '-')}-{key.digest}.npz"


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _storable(array: np.ndarray) -> np.ndarray:
    """View types that npz does not know, such as bfloat16, as integers of the same width."""
    return array if array.dtype.isbuiltin else array.view(f"u{array.dtype.itemsize}")


def _restored(array: np.ndarray, dtype: str) -> np.ndarray:
    wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return array if array.dtype == wanted else array.view(wanted)
