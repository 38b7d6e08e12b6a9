"""Write the recovery file of a model, as `spear_jax.recovery` reads it, from parameters that `calibrate.ablate` saved.

python -m calibrate.recover --params saves/ranges-ec.npz --details quantizer=clip arm=ranges-ec --output FILE.npz
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from calibrate.student import Params
from spear_jax import models
from spear_jax.cli import parse_flags, run_main
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.source import DEMO
from spear_jax.quant import CompensatorBank
from spear_jax.recovery import FACTORS, with_parameters, write_recovery


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """Turn parameters trained as `ranges`, `norms` and static compensators into a recovery file."""

    params: Path
    """What `python -m calibrate.ablate --save` wrote for an arm with joint=ranges+norms and static compensators."""

    output: Path
    """The .npz file to write."""

    model: str = DEMO
    """The model that was calibrated."""

    details: tuple[str, ...] = ()
    """What the file says of itself, as key=value."""


def save_params(path: Path, params: Params, ranks: dict[str, tuple[int, ...]], model: Decoder) -> None:
    """Write parameters, ranks and the finished model's scales as one npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {
        jax.tree_util.keystr(key, simple=True, separator="."): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    flat |= {f"ranks.{name}": np.asarray(values) for name, values in ranks.items()}
    flat |= {f"bits.{name}": np.asarray(bank.bits) for name, bank in model.compensators.items()}
    for name in ranks:
        weight = getattr(model.layers, name).weight
        flat |= {f"stored.{name}.scale": np.asarray(weight.scale.astype(jnp.float32))}
    np.savez(path, allow_pickle=False, **flat)


def recovery_arrays(exact: Decoder, saved: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the arrays of a recovery: trained scales, norm gains, int8 factors.

    Raises:
        ValueError: The parameters are not of scales whose codes follow, or the compensators are gated.
    """
    if missing := [name for name in MODULES if f"ranges.{name}" not in saved]:
        raise ValueError(f"no trained ranges of {', '.join(missing)}: codes would not follow from the scales")
    if any(name.startswith("gates.") for name in saved):
        raise ValueError("the compensators are gated, expected static ones")
    arrays = {f"{name}.scale": saved[f"stored.{name}.scale"] for name in MODULES}
    for key in saved:
        kind, _, name = key.partition(".")
        if kind == "norms":
            gain = getattr(exact if name == "final_norm" else exact.layers, name).weight[...]
            arrays[name] = np.asarray(gain.astype(jnp.float32) * (1 + saved[key]))
    for name in MODULES:
        if f"factors.{name}.a" in saved:
            factors = (jnp.asarray(saved[f"factors.{name}.{part}"]) for part in ("a", "bt"))
            bank = CompensatorBank(tuple(saved[f"ranks.{name}"].tolist()), *factors)
            bank = bank.to_int8(bits=4 if saved.get(f"bits.{name}") == 4 else 8)
            arrays |= {f"{name}.{part}": np.asarray(getattr(bank, part)[...]) for part in FACTORS}
            arrays[f"{name}.ranks"] = saved[f"ranks.{name}"]
    return arrays


def _main(config: RecoverConfig) -> None:
    with np.load(config.params) as stored:
        saved = {name: stored[name] for name in stored.files}
    exact = models.load(config.model, dtype="float32").model
    model = with_parameters(exact, recovery_arrays(exact, saved))
    details = {"reference": config.model, "zero_byte": ["ranges", "norms"]}
    write_recovery(config.output, model, details | dict(item.split("=", 1) for item in config.details))
    print(json.dumps({"output": str(config.output), "bytes": config.output.stat().st_size}))


def main() -> None:
    """Run the command line."""
    run_main(lambda: _main(parse_flags(RecoverConfig, prog="python -m calibrate.recover")))


if __name__ == "__main__":
    main()
