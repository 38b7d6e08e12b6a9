"""`rmsnorm_project` and `glu_project` on a TPU: one kernel over whole rows, which stay in vector memory."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul.operands import Compensator, Gate
from pallas_kernels.int4_matmul.reference import compensator_coordinates
from pallas_kernels.int4_matmul.tpu_kernel import LANES, LowRank, dot, gated
from pallas_kernels.tails.reference import Activation
from pallas_kernels.tpus import Generation, generation

type Kind = Literal["norm", "glu"]

_F32 = jnp.float32
_BLOCKS_M = (256, 128, 64, 32, 16)

_NETWORK = ("w_in", "b_in", "w_out", "b_out")

_WIDE_COPIES = 3
"""Copies of a block in float32 that the compiler may keep in vector memory."""


def rmsnorm_project_mosaic_tpu(
    residual: Float[Array, "*B K"],
    update: Float[Array, "*B K"] | None,
    weight: Float[Array, " K"],
    compensator: Compensator | None,
    *,
    eps: float,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute what `rmsnorm_project` documents; z is made of x as it is given, rounded.

    Raises:
        NotImplementedError: Activations are not bfloat16, the TPU is not known, K is no multiple of 128, or 16 rows do
            not fit into vector memory.
    """
    rows = residual.reshape(-1, residual.shape[-1])
    added = None if update is None else update.reshape(rows.shape)
    out = _tail("norm", rows, added, weight, compensator, eps=eps, interpret=interpret)
    h = residual if update is None else out["h"].reshape(residual.shape)
    return out["x"].reshape(residual.shape), h, _with_axes(out.get("z"), residual)


def glu_project_mosaic_tpu(
    gate_up: Float[Array, "*B 2*K"],
    compensator: Compensator | None,
    *,
    activation: Activation,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "*B K"], Float[Array, "*B R"] | None]:
    """Compute what `glu_project` documents; x is rounded once.

    Raises:
        NotImplementedError: As `rmsnorm_project_mosaic_tpu`.
    """
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    out = _tail("glu", rows, None, None, compensator, activation=activation, interpret=interpret)
    return out["x"].reshape(*gate_up.shape[:-1], -1), _with_axes(out.get("z"), gate_up)


def _with_axes(rows: Array | None, like: Array) -> Array | None:
    return None if rows is None else rows.reshape(*like.shape[:-1], rows.shape[-1])


def _tail(
    kind: Kind,
    first: Float[Array, "M _"],
    update: Float[Array, "M K"] | None,
    weight: Float[Array, " K"] | None,
    compensator: Compensator | None,
    *,
    eps: float = 0.0,
    activation: Activation = "silu",
    interpret: pltpu.InterpretParams | bool,
) -> dict[str, Array]:
    """Compute x, h where something is added, and z where there is a compensator; by name."""
    if first.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the TPU kernel is for bfloat16, got {first.dtype}")
    chip = generation()
    m, k = first.shape[0], first.shape[1] // (2 if kind == "glu" else 1)
    if k % LANES:
        raise NotImplementedError(f"{k} columns are no multiple of {LANES}")
    rank = 0 if compensator is None else compensator.rank
    bm = _block_rows(m, first.shape[1] + k * (1 if update is None else 3), k, rank, chip)

    def of_rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((bm, width), lambda i: (i, 0))

    operands = {"first": (first, of_rows(first.shape[1]))}
    out = {"x": jax.ShapeDtypeStruct((m, k), jnp.bfloat16)}
    if update is not None:
        operands["update"] = update, of_rows(k)
        out["h"] = out["x"]
    fixed = {} if weight is None else {"weight": weight.astype(_F32)[None]}
    gate = None if compensator is None else compensator.gate
    seeing = gate is not None and (gate.probe is not None or gate.w_rms is not None)  # more of x than z
    if compensator is not None and not seeing:
        fixed |= coordinate_operands(compensator)
        out["z"] = jax.ShapeDtypeStruct((m, rank), _F32)
    operands |= {name: (array, pl.BlockSpec(array.shape, lambda i: (0, 0))) for name, array in fixed.items()}
    names = [*operands, *(f"{name}_out" for name in out)]
    kernel = _Tail(kind=kind, eps=eps, activation=activation, form="tanh" if gate is None else gate.form)
    results = pl.pallas_call(
        lambda *refs: kernel(**dict(zip(names, refs, strict=True))),
        grid=(pl.cdiv(m, bm),),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[of_rows(array.shape[1]) for array in out.values()],
        out_shape=list(out.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=chip.vmem * 3 // 4),
        cost_estimate=pl.CostEstimate(
            flops=m * k * (8 + 2 * rank),
            bytes_accessed=2 * m * (first.shape[1] + k * (1 if update is None else 3)) + rank * k,
            transcendentals=m * k if kind == "glu" else m,
        ),
        name=f"{kind}_project",
        interpret=interpret,
    )(*(array for array, _ in operands.values()))
    found = dict(zip(out, results, strict=True))
    if compensator is not None and seeing:
        found["z"] = compensator_coordinates(found["x"], compensator)
    return found


def _block_rows(m: int, moved: int, k: int, rank: int, chip: Generation) -> int:
    """Give the rows of a block; `moved` are the columns that a row brings and takes."""
    most = min(_BLOCKS_M[0], -(-m // _BLOCKS_M[-1]) * _BLOCKS_M[-1])
    for bm in _BLOCKS_M:
        if bm <= most and 4 * bm * moved + 4 * rank * k + 4 * _WIDE_COPIES * bm * k <= chip.vmem // 2:
            return min(bm, m)
    raise NotImplementedError(f"{_BLOCKS_M[-1]} rows of {k} columns do not fit into the vector memory of {chip.name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tail:
    """The program of a block of rows."""

    kind: Kind
    eps: float
    activation: Activation
    form: str

    def __call__(self, *, x_out: Any, a: Any = None, a_scale: Any = None, z_out: Any = None, **refs: Any) -> None:
        x = (self._norm(**refs) if self.kind == "norm" else self._glu(**refs)).astype(x_out.dtype)
        x_out[...] = x
        if a is None:
            return
        z_out[...] = coordinates(x, a, a_scale, refs, form=self.form)

    def _norm(self, *, first: Any, weight: Any, update: Any = None, h_out: Any = None, **_: Any) -> Array:
        h = first[...].astype(_F32)
        if update is not None:
            summed = (h + update[...].astype(_F32)).astype(h_out.dtype)
            h_out[...] = summed
            h = summed.astype(_F32)
        return normalised(h, weight[...], eps=self.eps)

    def _glu(self, *, first: Any, **_: Any) -> Array:
        k = first.shape[1] // 2
        gate, up = first[:, :k].astype(_F32), first[:, k:].astype(_F32)
        return (jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up


def coordinate_operands(compensator: Compensator) -> dict[str, Array]:
    """Give what a kernel makes coordinates of, as it takes it: A, its scales as [1, R], and the gate's network."""
    a = compensator.rows_of_a()
    operands = {"a": a if a.dtype == jnp.int8 else a.astype(jnp.bfloat16)}
    if compensator.a_scale is not None:
        operands["a_scale"] = compensator.a_scale.astype(_F32)[None]
    return operands | gate_operands(compensator.gate)


def gate_operands(gate: Gate | None) -> dict[str, Array]:
    """Give the network of a gate that is fed by z alone, as `gated` takes it."""
    network = LowRank.gated_by(gate, bt=None)
    return {} if gate is None else {name: getattr(network, name) for name in _NETWORK}


def coordinates(x: Array, a: Any, a_scale: Any, refs: dict[str, Any], *, form: str) -> Array:
    """Multiply x with A, and apply the gate whose network is among `refs`, in a kernel."""
    z = dot(x, a[...].astype(x.dtype), of_rows=True)
    if a_scale is not None:
        z = z * a_scale[...]
    return gated(z, *(refs[name][...] for name in _NETWORK), form=form) if "w_in" in refs else z


def normalised(h: Array, weight: Array, *, eps: float) -> Array:
    """Give the norm of float32 rows, times [1, K] weights, in a kernel."""
    return h * jax.lax.rsqrt(jnp.mean(h * h, axis=1, keepdims=True) + eps) * weight
