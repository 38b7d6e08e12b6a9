"""The student: a frozen int4 base, and what may be trained on it, as a function from parameters to a model."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from calibrate.initialize import LowRank, whitened_svd
from calibrate.solvers.grid import CODE_MAX, CODE_MIN, HIGHEST
from calibrate.weights import int4_weight, with_weights
from pallas_kernels.int4_matmul import Compensator, Gate, gated_coordinates
from spear_jax.models.decoder import MODULES, NORMS, Decoder
from spear_jax.nn.linear import Linear, RMSNorm
from spear_jax.quant import Bits, CompensatorBank, QuantTensor

type Params = dict[str, Any]
"""Trainable parameters by group: "factors", "gates", "scales", "ranges", "norms", "codes"."""
type GateForm = Literal["static", "published", "linear", "shift"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Which gate compensators get, and how large it is.

    `form` "static" is none; "published" is 1 + tanh(MLP(z)); "linear" drops the tanh; "shift" adds MLP(z) to z.
    `hidden` is the width of the MLP. `probes` adds that many int8 projections of x, and `rms` the logarithm of its root
    mean square, to what the gate sees.
    """

    form: GateForm = "published"
    hidden: int = 4
    probes: int = 0
    rms: bool = False

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.probes < 0:
            raise ValueError(f"a gate needs hidden >= 1 and probes >= 0, got {self.hidden} and {self.probes}")

    @property
    def rank_bytes(self) -> int:
        """Bytes that each rank of a module adds, as stored in bfloat16."""
        return 0 if self.form == "static" else 2 * (2 * self.hidden + 1)

    def layer_bytes(self, inputs: int) -> int:
        """Count the bytes that a module's gate takes in each layer, whatever its rank."""
        if self.form == "static":
            return 0
        return 2 * self.hidden * (1 + self.probes + self.rms) + self.probes * (inputs + 4)


class TrainedLinear(Linear):
    """A dense linear whose products, and so those of its gradient, are all of the activations' type."""

    def __call__(
        self,
        x: Float[Array, "*B K"],
        *,
        compensator: Compensator | None = None,
        z: Float[Array, "*B R"] | None = None,
    ) -> Float[Array, "*B N"]:
        """Apply the layer; a gate is computed in float32. Coordinates of another type than x's are not taken."""
        del z
        assert not isinstance(self.weight, QuantTensor)
        y = jnp.einsum("...k,nk->...n", x, self.weight[...])
        if self.bias is not None:
            y = (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
        if compensator is None:
            return y
        gate, rows = compensator.gate, compensator.a
        if gate is not None and gate.probe is not None:
            rows = jnp.concatenate([rows, gate.probe])
        z = jnp.einsum("...k,rk->...r", x, rows.astype(x.dtype))
        if gate is not None:
            rank = compensator.a.shape[0]
            probed = None if gate.probe is None else z[..., rank:]
            z = gated_coordinates(x, z[..., :rank], probed, gate).astype(x.dtype)
        return y + jnp.einsum("...r,rn->...n", z, compensator.bt.astype(x.dtype))


def factor_bytes(shapes: dict[str, tuple[int, int]], *, bits: int = 8) -> dict[str, int]:
    """Give the bytes of one rank of each module's compensator in one layer: factors and two float32 scales."""
    return {name: (n + k) * bits // 8 + 8 for name, (n, k) in shapes.items()}


def initial_compensators(
    errors: dict[str, Float[Array, "L N K"]],
    moments: dict[str, Float[Array, "L K K"]],
    ranks: dict[str, tuple[int, ...]],
    gate: GateConfig,
    *,
    key: Array,
    low_ranks: dict[str, LowRank] | None = None,
) -> Params:
    """Initialise compensators by whitened SVD of the weight errors, with gates that start at exactly one.

    Coordinates z have a root mean square of one on the text that `moments` come from. `low_ranks` are the modules'
    decompositions where they are at hand, of the highest rank and as many more as the gate has probes, or higher.
    """
    factors, gates = {}, {}
    for name, per_layer in ranks.items():
        if not max(per_layer):
            continue
        probes = 0 if gate.form == "static" else gate.probes
        rank = min(max(per_layer) + probes, *errors[name].shape[-2:])
        if low_ranks is None:
            low = whitened_svd(errors[name], moments[name], rank=rank)
        else:
            low = low_ranks[name].truncate(rank)
        every_a, every_bt = _unit_factors(low, moments[name])
        a, bt = every_a[:, : max(per_layer)], every_bt[:, : max(per_layer)]
        rows = [(layer, r) for layer, rank in enumerate(per_layer) for r in range(rank)]
        layer, r = np.asarray(rows).T
        factors[name] = {"a": a[layer, r], "bt": bt[layer, r]}
        if gate.form == "static":
            continue
        hidden, layers = gate.hidden, len(per_layer)
        key, *keys = jax.random.split(key, 5)
        widest = max(per_layer) ** -0.5
        gates[name] = {
            "w_in": widest * jax.random.normal(keys[0], (len(rows), hidden)),
            "b_in": 0.5 * jax.random.normal(keys[1], (layers, hidden)),
            "w_out": jnp.zeros((len(rows), hidden)),
            "b_out": jnp.zeros(len(rows)),
        }
        if gate.probes:
            picked = np.asarray(per_layer)[:, None] + np.arange(gate.probes)
            gates[name]["probe"] = every_a[np.arange(layers)[:, None], picked]
            gates[name]["w_probe"] = gate.probes**-0.5 * jax.random.normal(keys[2], (layers, gate.probes, hidden))
        if gate.rms:
            gates[name]["w_rms"] = jax.random.normal(keys[3], (layers, hidden))
    return {"factors": factors} | ({"gates": gates} if gates else {})


def _unit_factors(low: LowRank, moment: Array) -> tuple[Float[Array, "L R K"], Float[Array, "L R N"]]:
    """Give factors scaled so that their coordinates have a root mean square of one."""
    power = jnp.einsum("lrk,lkj,lrj->lr", low.a, moment, low.a, precision=HIGHEST)
    size = jnp.sqrt(jnp.maximum(power, 1e-20))
    return low.a / size[..., None], jnp.swapaxes(low.b * size[:, None, :], -1, -2)


def zero_byte_params(base: Decoder, reference: Decoder, groups: tuple[str, ...]) -> Params:
    """Give parameters that change the base without adding bytes, at values that leave it as it is.

    "scales": logarithms of multipliers on scales, the codes being kept. "ranges": the same, with the reference's
    weights rounded to the nearest code again, so that codes follow from scales. "norms": multipliers of norm gains,
    less one. "codes": weights in units of codes, rounded in the forward pass.

    Raises:
        ValueError: A group is unknown.
    """
    params: Params = {}
    for group in groups:
        if group in ("scales", "ranges"):
            params[group] = {name: jnp.zeros(int4_weight(base, name).scale.shape, jnp.float32) for name in MODULES}
        elif group == "norms":
            gains = {n: norm.weight.shape for n in NORMS if (norm := getattr(base.layers, n)) is not None}
            gains["final_norm"] = base.final_norm.weight.shape
            params[group] = {name: jnp.zeros(shape, jnp.float32) for name, shape in gains.items()}
        elif group == "codes":
            params[group] = {name: _latent(int4_weight(base, name), reference, name) for name in MODULES}
        else:
            raise ValueError(f"unknown group of zero-byte parameters {group!r}; known: scales, ranges, norms, codes")
    return params


def _latent(tensor: QuantTensor, reference: Decoder, name: str) -> Float[Array, "L N K"]:
    """Give the reference weights in units of codes, moved into the cell of the code they have."""
    weight = getattr(reference.layers, name).weight[...].astype(jnp.float32)
    codes = tensor.codes().astype(jnp.float32)
    exact = _in_codes(weight, tensor.scale.astype(jnp.float32), tensor.zero)
    return codes + jnp.clip(exact - codes, -0.49, 0.49)


def _in_codes(weight: Array, scale: Array, zero: Array | None) -> Float[Array, "L N K"]:
    codes = weight.astype(jnp.float32) / _columns(scale, weight)
    return codes if zero is None else codes + _columns(zero.astype(jnp.float32), weight)


def _trained_scale(tensor: QuantTensor, params: Params, name: str) -> Float[Array, "L N G"]:
    scale = tensor.scale.astype(jnp.float32)
    for group in ("scales", "ranges"):
        if name in params.get(group, {}):
            scale = scale * jnp.exp(params[group][name])
    return scale


def _columns(per_group: Array, weight: Array) -> Array:
    return jnp.repeat(per_group, weight.shape[-1] // per_group.shape[-1], axis=-1)


def _round_through(values: Array) -> Array:
    """Round to codes, passing gradients on as if nothing had been rounded."""
    inside = jnp.clip(values, CODE_MIN - 0.49, CODE_MAX + 0.49)
    return inside + jax.lax.stop_gradient(jnp.clip(jnp.round(inside), CODE_MIN, CODE_MAX) - inside)


def _levels_through(rows: Float[Array, "*T F"], *, top: int) -> Float[Array, "*T F"]:
    """Round rows to levels -top .. top of their largest value, passing gradients straight through.

    With `top` 127, or 7 for four bits, these are the values that `CompensatorBank.to_int8` stores.
    """
    scale = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True) / top, 1e-12)
    return rows + jax.lax.stop_gradient(jnp.round(rows / scale) * scale - rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """How trainable parameters change a base; everything here is static but the arrays handed to `assemble`.

    Factors are rounded to codes of `bits`, 8 or 4, as they are stored; not at all without `int8`, for a trial.
    """

    ranks: dict[str, tuple[int, ...]]
    gate: GateConfig
    int8: bool = True
    bits: Bits = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"factors are of 4 or 8 bits, got {self.bits}")

    def assemble(self, base: Decoder, dense: dict[str, Array], params: Params) -> Decoder:
        """Build the dense model that the parameters stand for; differentiable.

        `base` holds `QuantTensor` linears; `dense` their weights in the model's type, used where nothing changes them,
        or, with "ranges", the reference's own weights.
        """
        dtype = base.dtype
        layers = jax.tree.map(lambda leaf: leaf, base.layers)
        for name in MODULES:
            linear = getattr(base.layers, name)
            weight = dense[name]
            if any(name in params.get(group, {}) for group in ("scales", "ranges", "codes")):
                weight = self._weight(int4_weight(base, name), params, name, weight).astype(dtype)
            setattr(layers, name, TrainedLinear(weight, None if linear.bias is None else linear.bias[...]))
        model = base.replace(layers=layers)
        for name, delta in params.get("norms", {}).items():
            owner = model if name == "final_norm" else model.layers
            norm: RMSNorm = getattr(owner, name)
            setattr(owner, name, RMSNorm(norm.weight[...].astype(jnp.float32) * (1 + delta), eps=norm.eps))
        for name, bank in self.banks(params).items():
            model.compensators[name] = bank
        return model

    def units(self, params: Params) -> Params:
        """Give the size of each parameter's natural step: what a learning rate is a fraction of.

        Rows of `a`: their root mean square; rows of `bt`: that of all rows of their layer, so that weak directions can
        grow; everything else is of order one by construction.
        """
        units = jax.tree.map(lambda leaf: jnp.ones((), leaf.dtype), params)
        for name, factors in params.get("factors", {}).items():
            power = {side: jnp.mean(jnp.square(rows), axis=-1) for side, rows in factors.items()}
            layer = np.repeat(np.arange(len(self.ranks[name])), self.ranks[name])
            sums = jax.ops.segment_sum(power["bt"], layer, len(self.ranks[name]))
            shared = (sums / np.maximum(np.asarray(self.ranks[name], np.float32), 1))[layer]
            units["factors"][name] = {"a": jnp.sqrt(power["a"])[:, None], "bt": jnp.sqrt(shared)[:, None]}
        for name, gate in params.get("gates", {}).items():
            if "probe" in gate:
                units["gates"][name]["probe"] = jnp.sqrt(jnp.mean(jnp.square(gate["probe"]), axis=-1, keepdims=True))
        return units

    def _weight(self, tensor: QuantTensor, params: Params, name: str, exact: Array) -> Float[Array, "L N K"]:
        scale = _trained_scale(tensor, params, name)
        if name in params.get("codes", {}):
            codes = _round_through(params["codes"][name])
        elif name in params.get("ranges", {}):
            codes = _round_through(_in_codes(exact, scale, tensor.zero))
        else:
            codes = tensor.codes().astype(jnp.float32)
        if tensor.zero is not None:
            codes = codes - _columns(tensor.zero.astype(jnp.float32), codes)
        return codes * _columns(scale, codes)

    def banks(self, params: Params) -> dict[str, CompensatorBank]:
        """Build the compensators in float32, rounded to the values that are stored."""
        top = 2 ** (self.bits - 1) - 1
        through = functools.partial(_levels_through, top=top) if self.int8 else lambda rows: rows
        banks = {}
        for name, factors in params.get("factors", {}).items():
            gate = None
            if name in params.get("gates", {}):
                arrays = dict(params["gates"][name])
                if "probe" in arrays:
                    arrays["probe"] = through(arrays["probe"])
                form = "tanh" if self.gate.form == "published" else self.gate.form
                assert form != "static"
                gate = Gate(**arrays, form=form)
            banks[name] = CompensatorBank(self.ranks[name], through(factors["a"]), through(factors["bt"]), gate=gate)
        return banks

    def finish(self, base: Decoder, params: Params, *, exact: Decoder | None = None) -> Decoder:
        """Build the model to store: `QuantTensor` linears, norms in their own type, rounded factors, bfloat16 gates.

        `exact`, the float model of the base, is needed with "ranges".
        """
        tensors = {}
        for name in MODULES:
            if not any(name in params.get(group, {}) for group in ("scales", "ranges", "codes")):
                continue
            tensor = int4_weight(base, name)
            scale = _trained_scale(tensor, params, name).astype(tensor.scale.dtype)
            codes: Int8[Array, "L N K"] = tensor.codes()
            if name in params.get("ranges", {}):
                assert exact is not None
                values = _in_codes(getattr(exact.layers, name).weight[...], scale.astype(jnp.float32), tensor.zero)
                codes = jnp.clip(jnp.round(values), CODE_MIN, CODE_MAX).astype(jnp.int8)
            if name in params.get("codes", {}):
                latent = params["codes"][name]
                codes = jnp.clip(jnp.round(latent), CODE_MIN, CODE_MAX).astype(jnp.int8)
            tensors[name] = QuantTensor.from_codes(codes, scale, tensor.zero)
        model = base.replace(layers=with_weights(base.layers, tensors))
        for name, delta in params.get("norms", {}).items():
            owner = model if name == "final_norm" else model.layers
            norm: RMSNorm = getattr(owner, name)
            gain = (norm.weight[...].astype(jnp.float32) * (1 + delta)).astype(norm.weight.dtype)
            setattr(owner, name, RMSNorm(gain, eps=norm.eps))
        for name, bank in self.banks(params).items():
            model.compensators[name] = bank.to_int8(bits=self.bits, gate_dtype=jnp.bfloat16) if self.int8 else bank
        return model
