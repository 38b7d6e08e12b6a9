"""Matrix product with int4 weights and an optional low-rank error compensator."""

from pallas_kernels.int4_matmul.api import Activation, Compensator, Gate, Layout, int4_matmul
from pallas_kernels.int4_matmul.reference import (
    compensator_coordinates,
    dequantize,
    gated_coordinates,
    low_rank_output,
)

__all__ = [
    "Activation",
    "Compensator",
    "Gate",
    "Layout",
    "compensator_coordinates",
    "dequantize",
    "gated_coordinates",
    "int4_matmul",
    "low_rank_output",
]
