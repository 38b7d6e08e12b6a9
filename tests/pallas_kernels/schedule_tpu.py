"""Count the bundles of int4_matmul in libtpu's static schedules; a process of its own, as dumps begin at its start.

Reads a JSON object of problems by name from stdin, writes one of counts to stdout. The folder of dumps is the argument.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.int4_matmul.tpu import int4_matmul_mosaic_tpu
from pallas_kernels.int4_matmul.tpu_kernel import TpuConfig
from pallas_kernels.topology import compiling_for_tpu

BF16 = jnp.dtype(jnp.bfloat16)


def bundles(problem: dict, dumps: Path) -> int:
    m, n, k, groups = (problem[name] for name in ("m", "n", "k", "groups"))
    config = TpuConfig(**problem["config"])
    with compiling_for_tpu(problem["tpu"]) as device:
        place = jax.sharding.SingleDeviceSharding(device)

        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        def run(x, packed, scale):
            return int4_matmul_mosaic_tpu(
                x, packed, scale, None, None, None, None, BF16, layout="columns", config=config
            )

        scale = array((groups, n), jnp.float32 if groups == 1 else BF16)
        jax.jit(run).lower(array((m, k), BF16), array((k // 2, n), jnp.int8), scale).compile()
    (report,) = dumps.glob("*int4_matmul*schedule-analysis_final_bundles.txt")
    (schedule,) = (path for path in dumps.glob("*int4_matmul*final_bundles.txt") if path != report)
    # A loop inside of the grid's would be counted once.
    assert len(re.findall(r" LB: ", schedule.read_text())) == 1
    found = re.search(r"total scheduled bundles: +(\d+)", report.read_text())
    assert found is not None
    for path in dumps.iterdir():
        path.unlink()
    return int(found[1])


def main() -> None:
    dumps = Path(sys.argv[1])
    json.dump({name: bundles(problem, dumps) for name, problem in json.load(sys.stdin).items()}, sys.stdout)


if __name__ == "__main__":
    main()
