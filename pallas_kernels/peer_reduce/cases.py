"""Cases of `peer_reduce` and `row_parallel` that tests and benchmarks share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.int4_matmul.operands import Compensator, Gate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A sum of M rows of N columns over devices; `k` columns a device for the product before, 0 for none.

    `rank` is that of the product's compensator, `following` that of the next one's; 0 for none.
    """

    m: int
    n: int
    k: int = 0
    rank: int = 0
    gated: bool = False
    following: int = 0
    dtype: str = "bfloat16"

    def operands(self, devices: int, *, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw operands by name: those that each device has of its own, stacked, and those that all have alike.

        y [P, M, N] and z [P, M, R] in float32, or where there is a product x [P, M, K] and codes [P, N, K], scales
        [P, N, 1] and A [P, R, K]; residual [M, N], weight [N], and compensators.
        """
        rng = np.random.default_rng(seed)

        def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), dtype)

        same: dict[str, Any] = {
            "residual": normal(self.m, self.n, dtype=self.dtype),
            "weight": 1 + normal(self.n) / 4,
            "following": None,
            "compensator": None,
        }
        if self.following:
            a = jnp.asarray(rng.integers(-127, 128, (self.following, self.n)), jnp.int8)
            scale = jnp.full(self.following, self.n**-0.5 / 64, jnp.float32)
            same["following"] = Compensator(a=a, a_scale=scale, bt=jnp.zeros((self.following, 64), jnp.int8))
        if self.rank:
            r, hidden = self.rank, max(2, self.rank // 2)
            gate = Gate(w_in=normal(r, hidden), b_in=normal(hidden), w_out=normal(r, hidden), b_out=normal(r))
            bt = jnp.asarray(rng.integers(-127, 128, (r, self.n)), jnp.int8)
            same["compensator"] = Compensator(
                a=jnp.zeros((r, max(self.k, 1)), jnp.int8),
                bt=bt,
                bt_scale=jnp.asarray(rng.uniform(0.5, 2, r) / 256, jnp.float32),
                gate=gate if self.gated else None,
            )
        if not self.k:
            own = {"y": normal(devices, self.m, self.n)}
            return own | ({"z": normal(devices, self.m, self.rank)} if self.rank else {}), same
        own = {
            "x": normal(devices, self.m, self.k, dtype=self.dtype),
            "codes": jnp.asarray(rng.integers(-8, 8, (devices, self.n, self.k)), jnp.int8),
            "scale": jnp.asarray(rng.uniform(0.5, 2, (devices, self.n, 1)) * self.k**-0.5 / 4, jnp.float32),
        }
        if self.rank:
            own["a"] = normal(devices, self.rank, self.k, dtype=jnp.bfloat16) * jnp.bfloat16(self.k**-0.5)
        return own, same


CASES = {
    "one_row": Case(m=1, n=256),
    "odd_rows": Case(m=5, n=192, rank=16),
    "static": Case(m=8, n=256, rank=16),
    "gated": Case(m=8, n=256, rank=16, gated=True),
    "following": Case(m=3, n=256, rank=16, gated=True, following=16),
    "no_compensator_following": Case(m=16, n=128, following=32),
    "odd_rank": Case(m=8, n=128, rank=5, gated=True, following=3),
    "product": Case(m=8, n=128, k=128),
    "product_static": Case(m=1, n=128, k=128, rank=16, following=16),
    "product_gated": Case(m=16, n=128, k=128, rank=16, gated=True),
}
