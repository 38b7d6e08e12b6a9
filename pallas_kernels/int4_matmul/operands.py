"""The operands that an int4 matmul's epilogue takes besides the weight."""

import dataclasses
from typing import Any

import jax

# Array fields are annotated `Any`: `jax.tree.map` puts other things than arrays into registered dataclasses.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """A per-token gate `g = 1 + tanh(w_out silu(w_in^T z + b_in) + b_out)`, one value in (0, 2) per rank coordinate.

    Shapes: w_in [R, H], b_in [H], w_out [R, H], b_out [R]. With `w_out` and `b_out` zero the gate is exactly one.
    Source: SPEAR, arXiv 2606.11244.
    """

    w_in: Any
    b_in: Any
    w_out: Any
    b_out: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compensator:
    """A gated low-rank term `B (g(z) * z)` with `z = A x` that is added to a quantized product.

    Shapes: a [R, K]; bt [R, N], the transpose of B, so that rank is the leading axis of both. Each is floating, or int8
    with one float scale per rank coordinate ([R]). `gate` None means `g = 1`: a static low-rank term.
    """

    a: Any
    bt: Any
    a_scale: Any = None
    bt_scale: Any = None
    gate: Gate | None = None
