"""The operands that an int4 matmul's epilogue takes besides the weight."""

import dataclasses
import functools
from typing import Any, Literal

import jax

from pallas_kernels.packing import factor_from_fragments

Activation = Literal["silu"]
"""What a product may end with: `silu(even) * odd` of its output channels, which alternate in blocks of 64."""

Layout = Literal["rows", "fragments", "columns"]
"""Order of the codes of a weight: packed row by row; as a Hopper warpgroup reads them (`fragments`); or `columns`: the
transpose of rows, [K/2, N], which is how a TPU's vector memory takes bytes apart. Beside the last two, scales and zero
points are [G, N]."""

Activations = Literal["as they are", "int8"]
"""What x is multiplied as: its own type, or int8 with one scale a row, rounded at every call."""

# Array fields are annotated `Any`: `jax.tree.map` puts other things than arrays into registered dataclasses.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w_in", "b_in", "w_out", "b_out", "probe", "probe_scale", "w_probe", "w_rms"],
    meta_fields=["form"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """A per-token gate on the rank coordinates `z`, computed by a small network of one hidden layer.

        h = w_out silu(w_in^T z + w_probe^T (probe x) + w_rms log(rms(x)) + b_in) + b_out

    Shapes: w_in [R, H], b_in [H], w_out [R, H], b_out [R]; optional further features: probe [P, K] (floating, or int8
    with probe_scale [P]) with w_probe [P, H], and w_rms [H]. With `w_out` and `b_out` zero it changes nothing.
    `form` says what h does: "tanh" multiplies z by 1 + tanh(h), in (0, 2), as published (SPEAR, arXiv 2606.11244);
    "linear" multiplies z by 1 + h, which may turn its sign; "shift" adds h to z.
    """

    w_in: Any
    b_in: Any
    w_out: Any
    b_out: Any
    probe: Any = None
    probe_scale: Any = None
    w_probe: Any = None
    w_rms: Any = None
    form: Literal["tanh", "linear", "shift"] = "tanh"

    @property
    def published(self) -> bool:
        """Say whether this is the gate as published: fed by z alone, in (0, 2)."""
        return self.form == "tanh" and self.probe is None and self.w_rms is None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensator:
    """A gated low-rank term `B (g(z) * z)` with `z = A x` that is added to a quantized product.

    Shapes: a [R, K]; bt [R, N], the transpose of B, so that rank is the leading axis of both. Each is floating, or int8
    with one float scale per rank coordinate ([R]). The GPU kernel reads other forms, which may stand in their places:
    b [N, R], and a_fragments, a bfloat16 `a` with all scales in it as `packing.factor_to_fragments` orders it.
    `gate` None means `g = 1`: a static low-rank term.
    """

    a: Any = None
    a_fragments: Any = None
    bt: Any = None
    b: Any = None
    a_scale: Any = None
    bt_scale: Any = None
    gate: Gate | None = None

    @property
    def rank(self) -> int:
        """Coordinates, R."""
        return self.b.shape[1] if self.bt is None else self.bt.shape[0]

    def rows_of_a(self) -> Any:
        """Give A as [R, K], whichever form it is kept in."""
        return factor_from_fragments(self.a_fragments, rank=self.rank) if self.a is None else self.a
