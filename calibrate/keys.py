"""What the result of each stage of a calibration depends on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibrate.config import CalibrateConfig
from calibrate.student import GateConfig
from calibrate.train import TrainConfig
from calibrate.workdir import Key


def stage_keys(c: CalibrateConfig, *paths: Path, dtype: str) -> dict[str, Key]:
    """Give the key of each stage: its settings, and those of the stages that it builds on.

    `paths` are the files or directories of the model and of its reference, `dtype` the type of activations.
    """

    def pick(*names: str) -> dict[str, Any]:
        return {name: getattr(c, name) for name in names}

    grid = pick("group_size", "asymmetric")
    files = [[file.name, *file_stamp(file)] for path in paths for file in _files(path)]
    keys = {"load": Key.first(files=files, dtype=dtype)}
    texts = [[name, *file_stamp(Path(name))] for name in c.text]
    settings = pick("sequences", "length", "text_share", "prompt_length", "bos_share", "seed")
    keys["text"] = keys["load"].then(texts=texts, **settings)
    keys["rtn"] = keys["load"].then(**grid)
    keys["quantize"] = keys["text"].then(**grid, **pick("quantizer", "moment_sequences"))
    keys["zero-byte"] = keys["quantize"]
    if c.zero_byte:
        keys["zero-byte"] = keys["quantize"].then(groups=c.zero_byte, train=_relevant(c.zero_config, c.zero_byte))
    keys["damage"] = keys["zero-byte"].then(**pick("damage_sequences"))
    for twin, gate in (("", c.gate_config), ("static ", GateConfig(form="static"))):
        settings = pick("placement", "latency_aware", "flatten", "max_rank", "budget", "factor_bits", "joint", "seed")
        initial = keys["damage"].then(gate=dataclasses.asdict(gate), **settings)
        local = initial.then(**pick("local_steps")) if c.local_steps else initial
        groups = ("factors", *(() if gate.form == "static" else ("gates",)), *c.joint)
        train = local.then(train=_relevant(c.train_config, groups))
        keys |= {f"{twin}initial": initial, f"{twin}local": local, f"{twin}train": train}
    return keys


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])


def file_stamp(path: Path) -> list[int]:
    """Give what tells a file from another of the same name; nothing for what is no file."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


def _relevant(config: TrainConfig, groups: Sequence[str]) -> dict[str, Any]:
    """Give the settings of training that matter to some groups of parameters: no rate of another."""
    rates = config.rates()
    values = {name: value for name, value in dataclasses.asdict(config).items() if not name.endswith("_rate")}
    if "factors" not in groups:
        del values["initial"]
    return values | {"final_rate": config.final_rate, "rates": {group: rates[group] for group in groups}}
