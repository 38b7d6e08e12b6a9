"""Cases of `rmsnorm_project` and `glu_project` that tests and benchmarks share."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.int4_matmul.operands import Compensator, Gate
from pallas_kernels.tails.reference import Activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """M rows of K columns before a product, whose compensator has a rank or is none (0)."""

    op: Literal["norm", "glu"]
    m: int
    k: int
    update: bool = True
    activation: Activation = "silu"
    rank: int = 0
    gated: bool = False
    probes: int = 0
    int8_factors: bool = True
    bt_scale: bool = True
    dtype: str = "bfloat16"

    def operands(self, *, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Draw random operands of the public function, positional and by keyword."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), dtype)

        keywords: dict[str, Any] = {"compensator": self._compensator(normal, rng) if self.rank else None}
        if self.op == "glu":
            return (normal(self.m, 2 * self.k, dtype=self.dtype),), keywords | {"activation": self.activation}
        update = normal(self.m, self.k, dtype=self.dtype) if self.update else None
        weight = 1 + normal(self.k) / 4
        return (normal(self.m, self.k, dtype=self.dtype), update, weight), keywords | {"eps": 1e-5}

    def _compensator(self, normal, rng: np.random.Generator) -> Compensator:
        r, hidden = self.rank, 3
        gate = None
        if self.gated:
            gate = Gate(w_in=normal(r, hidden), b_in=normal(hidden), w_out=normal(r, hidden), b_out=normal(r))
        if gate is not None and self.probes:
            probe, w_probe = normal(self.probes, self.k) * self.k**-0.5, normal(self.probes, hidden)
            gate = dataclasses.replace(gate, probe=probe, w_probe=w_probe)
        bt = jnp.zeros((r, 64), jnp.int8)
        bt_scale = jnp.ones(r) if self.bt_scale else None
        if not self.int8_factors:
            return Compensator(a=normal(r, self.k) * self.k**-0.5, bt=bt, bt_scale=bt_scale, gate=gate)
        a = jnp.asarray(rng.integers(-127, 128, (r, self.k)), jnp.int8)
        a_scale = jnp.asarray(rng.uniform(0.5, 2, r) * self.k**-0.5 / 64, jnp.float32)
        return Compensator(a=a, a_scale=a_scale, bt=bt, bt_scale=bt_scale, gate=gate)


CASES = {
    "norm": Case(op="norm", m=8, k=256),
    "norm_alone": Case(op="norm", m=3, k=128, update=False),
    "norm_rank_16": Case(op="norm", m=8, k=320, rank=16),
    "norm_alone_rank_5": Case(op="norm", m=1, k=192, update=False, rank=5),
    "norm_gated": Case(op="norm", m=16, k=128, rank=16, gated=True),
    "norm_rank_48": Case(op="norm", m=5, k=128, rank=48, int8_factors=False),
    "norm_rank_80": Case(op="norm", m=4, k=128, rank=80),
    "norm_probed": Case(op="norm", m=4, k=128, rank=16, gated=True, probes=2),
    "glu": Case(op="glu", m=8, k=192),
    "glu_gelu": Case(op="glu", m=7, k=128, activation="gelu_tanh", rank=16),
    "glu_rank_16": Case(op="glu", m=16, k=256, rank=16, bt_scale=False),
    "glu_gated_rank_3": Case(op="glu", m=2, k=64, rank=3, gated=True, int8_factors=False),
}
