"""What kernels for TPUs have in common: the generations, and what one core of each can do."""

import dataclasses

from pallas_kernels import dispatch

MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A TPU, by the figures of one core; a device that jax shows may hold two of them (`cores`).

    `bandwidth` of HBM in bytes a second, `bf16_flops` a second and `vmem` in bytes are those of
    `jax.experimental.pallas.tpu.TpuInfo`; `clock` in cycles a second is what its flops and matrix units come to.
    How the two rates were found: libtpu 0.0.48 compiled products with blocks of 512 to 2048 columns, and its static
    schedule, one bundle a cycle, was counted; the model in `int4_matmul.tpu` agrees with it within 15%. `weights` is
    how many int4 codes a cycle become bfloat16 and enter the matrix units. `macs` is how many pairs are multiplied, but
    no more than `bf16_flops` allows; with many rows schedules claim more, for tpu7x a third.
    `int8_rate` is how much faster than bfloat16 the matrix units multiply int8; 0 where they take none.
    """

    name: str
    kinds: tuple[str, ...]
    cores: int
    bandwidth: float
    bf16_flops: float
    vmem: int
    clock: float
    weights: int
    macs: int
    int8_rate: int


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation(
            name="v5e", kinds=("TPU v5 lite", "TPU v5e"), cores=1, bandwidth=820e9, bf16_flops=197e12,
            vmem=128 * MIB, clock=1.5e9, weights=1450, macs=65_000, int8_rate=2,
        ),
        Generation(
            name="v5p", kinds=("TPU v5", "TPU v5p"), cores=2, bandwidth=1230e9, bf16_flops=229.5e12,
            vmem=64 * MIB, clock=1.75e9, weights=1330, macs=65_000, int8_rate=2,
        ),
        Generation(
            name="v6e", kinds=("TPU v6 lite", "TPU v6e"), cores=1, bandwidth=1640e9, bf16_flops=920e12,
            vmem=128 * MIB, clock=1.75e9, weights=2350, macs=185_000, int8_rate=2,
        ),
        Generation(
            name="tpu7x", kinds=("TPU7x",), cores=1, bandwidth=3700e9, bf16_flops=1155e12,
            vmem=64 * MIB, clock=2.2e9, weights=3800, macs=262_000, int8_rate=0,
        ),
    )
}  # fmt: skip
"""Every TPU that kernels are compiled for in tests, by its short name."""

STEP_CYCLES = 180
"""What a step of a grid costs besides its work: the bundles around it in libtpu's static schedule."""


def generation(kind: str | None = None) -> Generation:
    """Give the generation of a device, by default of the one that is compiled for.

    Raises:
        NotImplementedError: It is no TPU that is known here.
    """
    kind = dispatch.device_kind() if kind is None else kind
    for found in GENERATIONS.values():
        if kind == found.name or kind in found.kinds:
            return found
    known = ", ".join(name for found in GENERATIONS.values() for name in found.kinds)
    raise NotImplementedError(f"block sizes are known for {known}, not for {kind}")
