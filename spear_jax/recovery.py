"""A calibrated model as a small file beside the model it was made from: its int4 codes are rounded again at load.

Where codes are the nearest ones of the reference's weights on trained scales, scales, norm gains and compensators say
everything: under two megabytes for a model of 135M parameters. A hash of the codes tells whether they came out bit for
bit as they were measured.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from spear_jax import models
from spear_jax.models import DType, LoadedModel, activation_dtype
from spear_jax.models.decoder import MODULES, NORMS, Decoder
from spear_jax.models.quantize import cast_model
from spear_jax.models.source import DEMO
from spear_jax.nn.linear import Linear, RMSNorm
from spear_jax.quant import CompensatorBank, QuantTensor

DEMO_FILE = Path(__file__).parent / "recovered" / "smollm2-135m-instruct.npz"
"""The demo model's; `calibrate/recover.py` writes it."""

FACTORS = ("a", "a_scale", "bt", "bt_scale")
"""Arrays of a compensator bank that a recovery holds, named `MODULE.ARRAY`, beside `MODULE.ranks`."""


def load_recovered(source: str = DEMO, path: Path = DEMO_FILE, *, dtype: DType = "auto") -> LoadedModel:
    """Load a model and quantize it as a recovery file says.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The recovery is of another model: shapes or rounded codes are not those that it was made with.
    """
    loaded = models.load(source, dtype="float32")
    model = recover(loaded.model, path)
    return dataclasses.replace(loaded, model=cast_model(model, activation_dtype(dtype)))


def recovery_details(path: Path = DEMO_FILE) -> dict[str, Any]:
    """Give what a recovery file says of itself: `reference`, `quantizer`, `zero_byte` and whatever its maker added."""
    with np.load(path) as stored:
        return json.loads(str(stored["details"]))


def round_to_scales(weight: Float[Array, "L N K"], scale: Float[np.ndarray, "L N 1"]) -> QuantTensor:
    """Round to the nearest codes in [-8, 7], on the host: IEEE division gives the same codes on every machine."""
    layers = []
    for rows, steps in zip(np.asarray(weight, np.float32), scale, strict=True):
        layers.append(np.clip(np.rint(rows / steps), -8, 7).astype(np.int8))
    return QuantTensor.from_codes(jnp.asarray(np.stack(layers)), jnp.asarray(scale))


def recover(exact: Decoder, path: Path) -> Decoder:
    """Quantize a float32 model of stacked layers by a recovery file.

    Raises:
        ValueError: The file was made for another model.
    """
    with np.load(path) as stored:
        arrays: dict[str, np.ndarray] = {name: stored[name] for name in stored.files}
    details = json.loads(str(arrays.pop("details")))
    try:
        model = with_parameters(exact, arrays)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not fit the model: {error}") from None
    if (found := hash_of_codes(model)) != details["codes_sha256"]:
        raise ValueError(
            f"{path} was made for other weights: they round to codes with SHA-256 {found[:12]}..., expected "
            f"{details['codes_sha256'][:12]}...; quantize this model by itself (serve --quantize rtn)"
        )
    return model


def with_parameters(exact: Decoder, arrays: dict[str, np.ndarray]) -> Decoder:
    """Quantize a float32 model by the arrays of a recovery: `MODULE.scale`, norm gains, compensators in int8."""
    layers: Any = jax.tree.map(lambda leaf: leaf, exact.layers)
    for name in MODULES:
        linear, scale = getattr(exact.layers, name), arrays[f"{name}.scale"]
        if scale.shape != (expected := (*linear.weight.shape[:2], 1)):
            raise ValueError(f"{name}.scale is {list(scale.shape)}, expected {list(expected)}")
        weight = round_to_scales(linear.weight[...], scale)
        setattr(layers, name, Linear(weight, None if linear.bias is None else linear.bias[...]))
    model = exact.replace(layers=layers, compensators=nnx.Dict())
    for name in (*NORMS, "final_norm"):
        if name in arrays:
            owner: Any = model if name == "final_norm" else model.layers
            setattr(owner, name, RMSNorm(jnp.asarray(arrays[name]), eps=getattr(owner, name).eps))
    for name in MODULES:
        if f"{name}.ranks" in arrays:
            a, a_scale, bt, bt_scale = (jnp.asarray(arrays[f"{name}.{part}"]) for part in FACTORS)
            ranks = tuple(arrays[f"{name}.ranks"].tolist())
            model.compensators[name] = CompensatorBank(ranks, a, bt, a_scale=a_scale, bt_scale=bt_scale)
    return model


def write_recovery(path: Path, model: Decoder, details: dict[str, Any]) -> None:
    """Write the recovery of a model that `with_parameters` can make again from its reference.

    Raises:
        ValueError: A compensator is gated, or its factors are not int8.
    """
    arrays: dict[str, Any] = {}
    for name in MODULES:
        arrays[f"{name}.scale"] = getattr(model.layers, name).weight.scale
    for name in (*NORMS, "final_norm"):
        norm = getattr(model if name == "final_norm" else model.layers, name)
        if norm is not None:
            arrays[name] = norm.weight[...]
    for name, bank in model.compensators.items():
        if bank.gate is not None or bank.a_scale is None:
            raise ValueError(f"{name}: a recovery holds static compensators in int8 only")
        arrays[f"{name}.ranks"] = np.asarray(bank.ranks, np.int32)
        arrays |= {f"{name}.{part}": getattr(bank, part)[...] for part in FACTORS}
    details = details | {"codes_sha256": hash_of_codes(model)}
    arrays["details"] = np.asarray(json.dumps(details))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})


def hash_of_codes(model: Decoder) -> str:
    """Give the SHA-256 of all packed int4 codes."""
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update(np.ascontiguousarray(getattr(model.layers, name).weight.packed))
    return digest.hexdigest()
