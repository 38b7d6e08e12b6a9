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
    files = [file for path in paths for file in _files(path)]
    stamps = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]
    texts = [[name, *file_stamp(Path(name))] for name in c.text]
    keys = {"load": Key.first(files=stamps, dtype=dtype)}
    keys["text"] = keys["load"].then(
        texts=texts,
        sequences=c.sequences,
        length=c.length,
        text_share=c.text_share,
        prompt_length=c.prompt_length,
        bos_share=c.bos_share,
        seed=c.seed,
    )
    keys["rtn"] = keys["load"].then(group_size=c.group_size, asymmetric=c.asymmetric)
    keys["quantize"] = keys["text"].then(
        quantizer=c.quantizer,
        group_size=c.group_size,
        asymmetric=c.asymmetric,
        moment_sequences=c.moment_sequences,
    )
    keys["zero-byte"] = keys["quantize"]
    if c.zero_byte:
        keys["zero-byte"] = keys["quantize"].then(groups=c.zero_byte, train=_relevant(c.zero_config, c.zero_byte))
    keys["damage"] = keys["zero-byte"].then(sequences=c.damage_sequences)
    placement = {"placement": c.placement, "flatten": c.flatten, "max_rank": c.max_rank, "budget": c.budget}
    gate = dataclasses.asdict(c.gate_config)
    groups = ("factors", *(() if c.gate == "static" else ("gates",)), *c.joint)
    train = _relevant(c.train_config, groups)
    keys["initial"] = keys["damage"].then(gate=gate, joint=c.joint, seed=c.seed, **placement)
    keys["train"] = keys["initial"].then(train=train)
    static = dataclasses.asdict(GateConfig(form="static"))
    keys["static initial"] = keys["damage"].then(gate=static, joint=c.joint, seed=c.seed, **placement)
    keys["static"] = keys["static initial"].then(train=_relevant(c.train_config, ("factors", *c.joint)))
    return keys


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])


def file_stamp(path: Path) -> list[int]:
    """Give what tells a file from another of the same name; nothing for what is no file."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []


def _relevant(config: TrainConfig, groups: Sequence[str]) -> dict[str, Any]:
    """Give the settings of training that matter to some groups of parameters: no rate of another."""
    values = dataclasses.asdict(config)
    rates = {f"{group}_rate": config.rates()[group] for group in groups}
    return (
        {name: value for name, value in values.items() if not name.endswith("_rate")}
        | rates
        | {"final_rate": config.final_rate}
    )
