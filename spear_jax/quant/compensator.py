"""Error compensators of a stack of layers, each layer with its own rank."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.int4_matmul import Compensator, Gate

type Bits = Literal[4, 8]
"""Bits of the codes of a compensator's factors."""


class CompensatorVariable(nnx.Variable):
    """Marks arrays of compensators: `nnx.split(model, CompensatorVariable, ...)` gives the trainable part."""


nnx.register_data_type(Gate)

_PER_LAYER = ("b_in", "probe", "probe_scale", "w_probe", "w_rms")
"""Arrays of a gate that do not belong to single rank coordinates: a bank stacks them over layers."""


class CompensatorBank(nnx.Module):
    """The compensators of one module ("qkv", "o", "gate_up" or "down") in all layers.

    Ranks differ by layer, so factors lie one after another along the rank axis, T = sum(ranks) rows in all:
    a [T, K] and bt [T, N] (int8 with scales [T], or floating), and, if gated, w_in [T, H], w_out [T, H], b_out [T] and
    b_in [L, H]; a gate's further features have a leading axis of layers: probe [L, P, K], probe_scale [L, P],
    w_probe [L, P, H], w_rms [L, H]. A layer of rank 0 has no compensator. Factors are not padded. `bits` 4 says that
    int8 factors hold codes of -7 .. 7: a checkpoint stores two in a byte, memory and kernels one.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        a: Array,
        bt: Array,
        *,
        a_scale: Array | None = None,
        bt_scale: Array | None = None,
        gate: Gate | None = None,
        bits: Bits = 8,
    ) -> None:
        total = sum(ranks)
        for name, rows in {"a": a, "bt": bt, "a_scale": a_scale, "bt_scale": bt_scale}.items():
            if rows is not None and rows.shape[0] != total:
                raise ValueError(f"{name} has {rows.shape[0]} rows for ranks that sum to {total}")
        self.ranks = tuple(int(r) for r in ranks)
        self.bits: Bits = bits
        self.a = CompensatorVariable(a)
        self.bt = CompensatorVariable(bt)
        self.a_scale = None if a_scale is None else CompensatorVariable(a_scale)
        self.bt_scale = None if bt_scale is None else CompensatorVariable(bt_scale)
        self.gate = None if gate is None else jax.tree.map(CompensatorVariable, gate)

    @property
    def nbytes(self) -> int:
        """Bytes of factors, scales and gates as stored."""
        spared = (self.a.size + self.bt.size) // 2 if self.bits == 4 else 0
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self)) - spared

    def at(self, layer: int | Int[Array, ""]) -> Compensator | None:
        """Give the compensator of one layer.

        A Python int gives exactly the layer's rank, or None for rank 0. A traced index gives max(ranks) rows in which
        those beyond the layer's rank have zero `bt`, so that they add nothing.
        """
        widest = max(self.ranks, default=0)
        if widest == 0:
            return None
        starts = [sum(self.ranks[:i]) for i in range(len(self.ranks))]
        if isinstance(layer, int):
            if self.ranks[layer] == 0:
                return None
            rows = slice(starts[layer], starts[layer] + self.ranks[layer])
            return self._slice(lambda x: x[rows], layer)
        # A slice that would run past the end is moved back, and the rows before the layer's own are masked as well.
        last = sum(self.ranks) - widest
        first = jnp.asarray([min(s, last) for s in starts])[layer]
        own = first + jnp.arange(widest) - jnp.asarray(starts)[layer]
        inside = (own >= 0) & (own < jnp.asarray(self.ranks)[layer])

        def take(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, first, widest)

        whole = self._slice(take, layer)
        bt = jnp.where(inside[:, None], whole.bt, jnp.zeros((), whole.bt.dtype))
        gate = whole.gate
        if gate is not None:
            # The hidden layer of the gate mixes coordinates, so foreign ones must not enter it.
            gate = dataclasses.replace(gate, w_in=jnp.where(inside[:, None], gate.w_in, 0))
        return dataclasses.replace(whole, bt=bt, gate=gate)

    def _slice(self, rows: Callable[[Array], Array], layer: int | Int[Array, ""]) -> Compensator:
        def get(variable: nnx.Variable | None) -> Array | None:
            return None if variable is None else rows(variable[...])

        gate = self.gate
        if gate is not None:
            gate = Gate(
                w_in=get(gate.w_in), w_out=get(gate.w_out), b_out=get(gate.b_out), form=gate.form,
                **{name: None if (whole := getattr(gate, name)) is None else whole[...][layer] for name in _PER_LAYER},
            )  # fmt: skip
        return Compensator(
            a=get(self.a), bt=get(self.bt), a_scale=get(self.a_scale), bt_scale=get(self.bt_scale), gate=gate
        )

    def to_int8(self, *, bits: Bits = 8, gate_dtype: jnp.dtype | type | None = None) -> Self:
        """Give the bank with factors in int8, one scale per rank coordinate, and gates in `gate_dtype`.

        The scale is max|row| / 127, or with `bits` 4 max|row| / 7.
        """
        a, a_scale = _int8_rows(self.a[...], bits)
        bt, bt_scale = _int8_rows(self.bt[...], bits)
        gate = None
        if self.gate is not None:
            gate = jax.tree.map(lambda v: v[...], self.gate, is_leaf=lambda v: isinstance(v, nnx.Variable))
            if gate_dtype is not None:
                gate = jax.tree.map(lambda array: array.astype(gate_dtype), gate)
            if gate.probe is not None:
                probe, probe_scale = _int8_rows(gate.probe)
                gate = dataclasses.replace(gate, probe=probe, probe_scale=probe_scale)
        return type(self)(self.ranks, a, bt, a_scale=a_scale, bt_scale=bt_scale, gate=gate, bits=bits)


def _int8_rows(rows: Float[Array, "*T F"], bits: int = 8) -> tuple[Array, Array]:
    scale = jnp.maximum(jnp.max(jnp.abs(rows.astype(jnp.float32)), axis=-1) / (2 ** (bits - 1) - 1), 1e-12)
    return jnp.round(rows.astype(jnp.float32) / scale[..., None]).astype(jnp.int8), scale
