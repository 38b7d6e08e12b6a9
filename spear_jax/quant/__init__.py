"""Int4 weights: their storage, how they are rounded, and the error compensators that go with them."""

from spear_jax.quant.compensator import Bits, CompensatorBank, CompensatorVariable
from spear_jax.quant.qtensor import QuantSpec, QuantTensor
from spear_jax.quant.rows import DividedRows, Int8Rows
from spear_jax.quant.rtn import round_to_nearest

__all__ = [
    "Bits",
    "CompensatorBank",
    "CompensatorVariable",
    "DividedRows",
    "Int8Rows",
    "QuantSpec",
    "QuantTensor",
    "round_to_nearest",
]
