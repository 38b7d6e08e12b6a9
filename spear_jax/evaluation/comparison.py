"""The variants of a calibrated model side by side: the reference, plain rounding, the int4 base, compensators."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from spear_jax.checkpoint import component_bytes, is_checkpoint, load_checkpoint
from spear_jax.models import DType, LoadedModel
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec

type ArmName = Literal["reference", "rtn", "w4", "static", "gated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overhead:
    """Bytes of compensators as stored, with the two totals that they are a share of.

    `model` is the whole W4 model as a checkpoint stores it (int4 codes, scales, embedding, norms, head); `linears` its
    int4 linears alone.
    """

    compensators: int
    model: int
    linears: int

    @classmethod
    def of(cls, model: Decoder) -> "Overhead":
        """Count the bytes of a quantized model."""
        sizes = component_bytes(model)
        compensators = sizes.get("compensator factors", 0) + sizes.get("compensator gates", 0)
        linears = sizes.get("int4 codes", 0) + sizes.get("int4 scales", 0)
        return cls(compensators=compensators, model=sum(sizes.values()) - compensators, linears=linears)

    def as_json(self) -> dict[str, float]:
        """Give the bytes, and the share of each total."""
        return {
            "compensator_bytes": self.compensators,
            "overhead_of_model": self.compensators / self.model,
            "overhead_of_linears": self.compensators / self.linears,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One arm of a comparison: its name, what it is, and how to get its model."""

    name: ArmName
    label: str
    load: Callable[[], Decoder]


def without_compensators(model: Decoder) -> Decoder:
    """Give the base that compensators were put on."""
    from flax import nnx

    return model.replace(compensators=nnx.Dict())


def is_gated(model: Decoder) -> bool:
    """Say whether any compensator has a gate."""
    return any(bank.gate is not None for bank in model.compensators.values())


def variants(
    details: dict[str, Any],
    calibrated: LoadedModel,
    *,
    path: Path | None,
    dtype: DType,
    load_source: Callable[..., LoadedModel],
) -> tuple[list[Variant], list[str]]:
    """Give the arms that a calibrated model can be compared with, and why others are left out, a sentence each.

    `details` name its reference, and where, from the checkpoint's `path`, the static twin of a gated one lies.
    """
    model = calibrated.model
    arms, notes = [], []
    source = details.get("reference")
    if source is None:
        notes.append("reference and rtn are left out: the checkpoint does not name the model it was made from")
    else:
        weight = model.layers.qkv.weight  # type: ignore[union-attr]
        spec = QuantSpec(group_size=weight.group_size, symmetric=weight.zero is None)

        def reference() -> Decoder:
            return load_source(source, dtype=dtype).model

        arms.append(Variant(name="reference", label=f"reference ({source})", load=reference))
        rounded = Variant(name="rtn", label="RTN", load=lambda: quantize_model(reference(), spec))
        if details.get("quantizer") != "rtn" or details.get("zero_byte"):
            arms.append(rounded)
    base = str(details.get("quantizer", "int4"))
    if details.get("zero_byte"):
        base += " + zero-byte training"
    if model.compensators:
        arms.append(Variant(name="w4", label=f"W4 ({base})", load=lambda: without_compensators(model)))
    else:
        notes.append("static and gated are left out: the checkpoint has no compensators")
        arms.append(Variant(name="w4", label=f"W4 ({base})", load=lambda: model))
        return arms, notes
    if not is_gated(model):
        notes.append("gated is left out: the checkpoint's compensators have no gate")
        arms.append(Variant(name="static", label="W4 + static EC", load=lambda: model))
        return arms, notes
    twin = details.get("static")
    if path is not None and twin is not None and is_checkpoint(path / twin):
        place = path / twin
        static = Variant(name="static", label="W4 + static EC", load=lambda: load_checkpoint(place, dtype=dtype).model)
        arms.append(static)
    else:
        notes.append("static is left out: no static compensators of equal bytes were trained (calibrate --static-too)")
    arms.append(Variant(name="gated", label="W4 + gated EC", load=lambda: model))
    return arms, notes


def compare(
    arms: list[Variant], measure: Callable[[Decoder, str], dict[str, Any]]
) -> Iterator[tuple[ArmName, dict[str, Any]]]:
    """Measure each arm in turn, holding one model beside the checkpoint's own at a time; gives plain JSON values."""
    for arm in arms:
        model = jax.block_until_ready(arm.load())
        result = {"label": arm.label, **measure(model, arm.label)}
        if arm.name in ("static", "gated"):
            result |= Overhead.of(model).as_json()
        yield arm.name, result


def add_recovery(arms: dict[ArmName, dict[str, Any]]) -> None:
    """Add the share of the gaps from RTN and from W4 to the reference that each arm closes, where there is a gap."""
    reference = arms.get("reference", {}).get("perplexity")
    if reference is None:
        return
    for base in ("rtn", "w4"):
        worst = arms.get("rtn", arms.get("w4", {})) if base == "rtn" else arms.get("w4", {})
        gap = worst.get("perplexity", reference) - reference
        for arm in arms.values():
            if gap > 0 and "perplexity" in arm:
                arm[f"recovered_of_{base}"] = (worst["perplexity"] - arm["perplexity"]) / gap
