"""Choose block sizes of `int4_matmul` for every TPU by the cost model, and keep them as data. Needs no TPU.

python -m pallas_kernels.tune_tpu --output pallas_kernels/tuned
python -m pallas_kernels.tune_tpu --table        # prints the table of pallas_kernels/README.md

The model's constants are fitted to the compiler's static schedules; no TPU was measured. A measurement, once there is
one, replaces entries of the same key.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import shapes, tuning
from pallas_kernels.int4_matmul.tpu import block_rows, candidates, predicted_seconds
from pallas_kernels.int4_matmul.tpu_kernel import TpuConfig, config_bytes
from pallas_kernels.tpus import GENERATIONS, Generation

_RANK = 64
"""Rank of the compensator that choices leave vector memory for."""

_GROUP = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the cost model says of a product on one TPU, all its cores together; bytes are of HBM, times in seconds."""

    config: TpuConfig
    seconds: float
    roofline: float
    moved: int
    least: int
    codes: int


SHAPES = {name: shapes.SHAPES[name] for name in ("llama-3.1-8b", "llama-3.2-1b")} | {
    "llama-3.1-8b-tp4": {"o": (4096, 1024), "qkv": (1536, 4096), "down": (4096, 3584), "gate_up": (7168, 4096)}
}
"""Products that block sizes are stored for: whole models, and a fourth of one."""


def predict(chip: Generation, m: int, n: int, k: int, *, groups: int = 1) -> Prediction:
    """Choose a configuration for m rows and a weight [n, k], and predict its time and bytes, without a compensator."""
    shape: dict[str, Any] = {"groups": groups, "rank": _RANK}
    fitting = candidates(block_rows(m), n, k, **shape, chip=chip)
    shape["rank"] = 0
    config = min(fitting, key=lambda config: predicted_seconds(config, m, n, k, **shape, chip=chip))
    scale = jax.ShapeDtypeStruct((groups, n), jnp.float32 if groups == 1 else jnp.bfloat16)
    operands = [jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((k // 2, n), jnp.int8), scale]
    least = sum(array.size * array.dtype.itemsize for array in operands) + 2 * m * n
    flops = 2 * m * n * k / chip.bf16_flops
    return Prediction(
        config=config,
        seconds=predicted_seconds(config, m, n, k, **shape, chip=chip),
        roofline=max(least / chip.bandwidth, flops) / chip.cores,
        moved=config_bytes(config, n=n, k=k, operands=operands, out=jax.ShapeDtypeStruct((m, n), jnp.bfloat16)),
        least=least,
        codes=n * k // 2,
    )


def entries(chip: Generation, rows: list[int]) -> list[dict[str, Any]]:
    """List what is to be stored for a TPU: every shape of `SHAPES`, per channel and in groups of 128."""
    found = {}
    for products in SHAPES.values():
        for n, k in products.values():
            for groups in (1, k // _GROUP):
                for m in rows:
                    key = {"tile_m": block_rows(m), "n": n, "k": k, "groups": groups, "rank": 0}
                    best = predict(chip, m, n, k, groups=groups)
                    times = {"predicted_us": best.seconds, "roofline_us": best.roofline}
                    found[str(key)] = {
                        "key": key,
                        "config": dataclasses.asdict(best.config),
                        **{name: round(seconds * 1e6, 2) for name, seconds in times.items()},
                    }
    return list(found.values())


def write(folder: Path, chip: Generation, rows: list[int]) -> Path:
    """Write a TPU's file, one entry a line."""
    file = folder / tuning.device_name(chip.kinds[0]) / "int4_matmul.json"
    head = {
        "device": chip.kinds[0],
        "measured": False,
        "command": "python -m pallas_kernels.tune_tpu " + " ".join(sys.argv[1:]),
    }
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries(chip, rows))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "entries": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return file


def table(models: list[str], rows: list[int]) -> str:
    """Give a table of bytes and times, a layer's four products together, in Markdown."""
    lines = [
        "| TPU | model | rows | MB moved | of the least | of the codes | predicted us | roofline us | of roofline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for chip in GENERATIONS.values():
        for model in models:
            for m in rows:
                found = [predict(chip, m, n, k) for n, k in SHAPES[model].values()]
                moved, least, codes = (sum(getattr(p, name) for p in found) for name in ("moved", "least", "codes"))
                seconds, roofline = (sum(getattr(p, name) for p in found) * 1e6 for name in ("seconds", "roofline"))
                lines.append(
                    f"| {chip.name} | {model} | {m} | {moved / 1e6:.1f} | {moved / least:.2f} | {moved / codes:.2f} "
                    f"| {seconds:.0f} | {roofline:.0f} | {100 * roofline / seconds:.0f}% |"
                )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune_tpu", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512, 1024], help="rows of x")
    parser.add_argument("--table", action="store_true", help="print bytes and predicted times of a layer's products")
    parser.add_argument("--output", type=Path, help="folder to write <device>/int4_matmul.json into")
    flags = parser.parse_args()
    if flags.table:
        print(table(["llama-3.2-1b", "llama-3.1-8b"], [1, 16, 128, 1024]))
    if flags.output is not None:
        for chip in GENERATIONS.values():
            print(write(flags.output, chip, flags.rows))
    if not flags.table and flags.output is None:
        parser.error("nothing to do: give --table or --output")


if __name__ == "__main__":
    main()
