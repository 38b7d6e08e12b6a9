"""Cases of `int4_matmul` that tests, benchmarks and tuning share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.int4_matmul.operands import Compensator, Gate
from pallas_kernels.packing import pack_int4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One product of M rows, N outputs, K inputs; `group` columns a scale (-1: all); `rank` of the compensator or 0."""

    m: int
    n: int
    k: int
    group: int = -1
    symmetric: bool = True
    bias: bool = False
    rank: int = 0
    gated: bool = False
    int8_factors: bool = False
    dtype: str = "float32"
    scale_spread: float = 2.0

    def operands(self, *, seed: int = 0) -> tuple[tuple[jax.Array, ...], dict]:
        """Draw random operands: positional (x, packed, scale) and keyword ones of `int4_matmul`."""
        rng = np.random.default_rng(seed)
        groups = 1 if self.group == -1 else self.k // self.group
        x = jnp.asarray(rng.standard_normal((self.m, self.k)), self.dtype)
        packed = pack_int4(jnp.asarray(rng.integers(-8, 8, (self.n, self.k)), jnp.int8))
        spread = self.scale_spread ** rng.uniform(-1, 1, (self.n, groups))
        scale = jnp.asarray(spread * self.k**-0.5 / 4, jnp.float32)
        keywords: dict = {}
        if not self.symmetric:
            keywords["zero"] = jnp.asarray(rng.integers(-8, 8, (self.n, groups)), jnp.int8)
        if self.bias:
            keywords["bias"] = jnp.asarray(rng.standard_normal(self.n), self.dtype)
        if self.rank:
            keywords["compensator"] = self._compensator(rng)
        return (x, packed, scale), keywords

    def _compensator(self, rng: np.random.Generator) -> Compensator:
        r, hidden = self.rank, max(2, self.rank // 2)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        gate = Gate(w_in=normal(r, hidden), b_in=normal(hidden), w_out=normal(r, hidden), b_out=normal(r))
        if self.int8_factors:
            factors = {
                "a": jnp.asarray(rng.integers(-127, 128, (r, self.k)), jnp.int8),
                "bt": jnp.asarray(rng.integers(-127, 128, (r, self.n)), jnp.int8),
                "a_scale": jnp.full(r, self.k**-0.5 / 64, jnp.float32),
                "bt_scale": jnp.full(r, 1 / 64, jnp.float32),
            }
        else:
            factors = {"a": normal(r, self.k) * self.k**-0.5, "bt": normal(r, self.n)}
        return Compensator(**factors, gate=gate if self.gated else None)


CASES = {
    "per_channel": Case(m=8, n=64, k=128),
    "one_row": Case(m=1, n=96, k=64),
    "odd_rows": Case(m=13, n=40, k=192, bias=True),
    "group_32": Case(m=8, n=64, k=128, group=32),
    "group_64": Case(m=5, n=64, k=192, group=64, bias=True),
    "group_128": Case(m=8, n=32, k=256, group=128),
    "asymmetric": Case(m=8, n=64, k=128, symmetric=False),
    "asymmetric_group_32": Case(m=3, n=64, k=128, group=32, symmetric=False, bias=True),
    "extreme_scales": Case(m=8, n=64, k=128, scale_spread=1e4),
    "extreme_group_scales": Case(m=8, n=64, k=128, group=32, symmetric=False, scale_spread=1e4),
    "odd_columns": Case(m=5, n=72, k=80, symmetric=False, bias=True),
    "odd_groups": Case(m=5, n=40, k=96, group=32, symmetric=False),
    "odd_everything": Case(m=19, n=168, k=208, group=16, symmetric=False, bias=True, rank=7, gated=True),
    "static_rank_3": Case(m=8, n=64, k=128, rank=3),
    "gated_rank_5": Case(m=7, n=64, k=128, rank=5, gated=True, bias=True),
    "static_rank_19": Case(m=9, n=64, k=128, rank=19),
    "gated_rank_16_int8": Case(m=8, n=64, k=128, rank=16, gated=True, int8_factors=True),
    "gated_group_64_int8": Case(m=8, n=64, k=128, group=64, rank=8, gated=True, int8_factors=True, symmetric=False),
    "bfloat16": Case(m=8, n=64, k=128, rank=8, gated=True, dtype="bfloat16"),
}
