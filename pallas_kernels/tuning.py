"""Tuned settings of kernels: `tuned/<device>/<operation>.json`, written by `python -m pallas_kernels.tune`."""

import functools
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jax

Key = Mapping[str, int]


def device_name(kind: str | None = None) -> str:
    """Give the name of a device's folder: its kind, by default this process's first device's, in small letters."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def lookup(operation: str, key: Key, *, device: str | None = None) -> dict[str, Any] | None:
    """Give the settings tuned for exactly this key, or None; `rank` 0 stands for any rank that has none of its own."""
    table = read_table(operation, device_name() if device is None else device)
    for wanted in (key, {**key, "rank": 0}) if "rank" in key else (key,):
        if (settings := table.get(_name(wanted))) is not None:
            return settings
    return None


@functools.cache
def read_table(operation: str, device: str) -> dict[str, dict[str, Any]]:
    """Read the settings of an operation on a device, by name of the key; empty where it was never tuned."""
    file = resources.files("pallas_kernels") / "tuned" / device / f"{operation}.json"
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
    return {_name(entry["key"]): entry["config"] for entry in entries}


def _name(key: Key) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(key.items()))
