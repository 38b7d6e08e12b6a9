"""Make tables in Markdown from results of `pallas_kernels.bench`.

python -m pallas_kernels.tables pallas_kernels/results/int4_matmul.json
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.shapes import SHAPES

_FEW_ROWS = 64
_TOLERANCE = 5e-2
"""Relative error above which a peer's result is wrong, and its time worth nothing."""

_MEANS_OF = "llama-3.1-8b"

OURS = {"int4": "int4", "int4_ec": "+ EC, z known", "int4_ec_with_z": "+ EC"}
XLA = {"bf16": "XLA bf16", "xla_int4": "XLA int4"}
PEERS = {
    "torch_bf16": "cuBLAS bf16",
    "torch_int4pack_128": "torch int4",
    "humming_channel": "Humming",
    "humming_128": "Humming, 128",
    "gemlite_128": "GemLite, 128",
    "gemlite_channel": "GemLite",
}


def render(results: dict[str, Any], models: Sequence[str] = ()) -> str:
    """Give a table for every model and size of groups, geometric means, and what failed."""
    pieces = []
    groups = sorted({entry["group"] for entry in results["int4_matmul"]}) or [-1]
    for model in models or SHAPES:
        for group in groups:
            rows = _rows(results, model, group)
            scales = "one scale a channel" if group == -1 else f"groups of {group}"
            for few in (True, False):
                some = [row for row in rows if (row["m"] <= _FEW_ROWS) == few]
                if some:
                    pieces += [f"### {model}, {scales}, {'few' if few else 'many'} rows", _table(some, few=few)]
    for group in groups:
        if rows := _rows(results, _MEANS_OF, group):
            scales = "one scale a channel" if group == -1 else f"groups of {group}"
            pieces += [f"### {_MEANS_OF}, {scales}, geometric means", _means(rows)]
    if failures := _failures(results):
        pieces += ["### What failed", failures]
    return "\n\n".join([*_ceilings(results["runs"]), *pieces])


def _rows(results: dict[str, Any], model: str, group: int) -> list[dict[str, Any]]:
    """Bring what was found for each product together: `us` alone, `row` in a row, by name."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for weight, (n, k) in SHAPES[model].items():
        ours = [one for one in results["int4_matmul"] if (one["model"], one["weight"]) == (model, weight)]
        peers = [one for one in results["peers"] if (one["model"], one["weight"]) == (model, weight)]
        for m in sorted({one["m"] for one in [*ours, *peers]}):
            row: dict[str, Any] = {"weight": weight, "m": m, "n": n, "k": k, "us": {}, "row": {}, "run": None}
            for one in ours:
                if one["m"] == m and one["group"] == group:
                    row |= {"us": one["us"], "row": dict(one["us_in_a_row"]), "run": results["runs"][one["run"]]}
            for one in peers:
                if one["m"] == m and "failure" not in one and one["error"] < _TOLERANCE:
                    row["row"][one["method"]] = one["us_in_a_row"]
            found[weight, m] = row
    return sorted(found.values(), key=lambda row: (row["m"], list(SHAPES[model]).index(row["weight"])))


def _best(row: dict[str, Any]) -> tuple[str, float] | None:
    """Give the fastest peer and its time."""
    times = {name: us for name, us in row["row"].items() if name in PEERS}
    best = min(times, key=lambda name: times[name], default=None)
    return None if best is None else (best, times[best])


def _ratio(row: dict[str, Any], peer: str | None = None) -> float | None:
    """Give how many times as long a peer takes, the best by default; both in a row."""
    ours, best = row["row"].get("int4"), _best(row)
    theirs = row["row"].get(peer) if peer is not None else None if best is None else best[1]
    return None if ours is None or theirs is None else theirs / ours


def _table(rows: Sequence[dict[str, Any]], *, few: bool) -> str:
    alone = [name for name in (*XLA, *OURS) if any(name in row["us"] for row in rows)]
    together = [name for name in ("int4", "int4_ec_with_z", *PEERS) if any(name in row["row"] for row in rows)]
    names = XLA | OURS | PEERS
    speed = ["of reading"] if few else ["Tflop/s", "of matmul"]
    head = ["weight [N, K]", "rows", *(names[name] for name in alone), *speed]
    head += [f"in a row: {names[together[0]]}" if together else "in a row", *(names[name] for name in together[1:])]
    head += ["best peer / int4", "cuBLAS / int4"]
    lines = []
    for row in rows:
        cells = [f"{row['weight']} [{row['n']}, {row['k']}]", f"{row['m']:,}"]
        cells += [_us(row["us"].get(name)) for name in alone]
        cells += _speed(row, few=few)
        cells += [_us(row["row"].get(name)) for name in together] or [""]
        best, ratio, cublas = _best(row), _ratio(row), _ratio(row, "torch_bf16")
        cells.append("" if ratio is None or best is None else f"{ratio:.2f} ({PEERS[best[0]]})")
        cells.append("" if cublas is None else f"{cublas:.2f}")
        lines.append(cells)
    return _markdown(head, lines)


def _speed(row: dict[str, Any], *, few: bool) -> list[str]:
    """Give the share of the bandwidth of reading that ours reaches; or its operations a second and their share."""
    us = row["us"].get("int4")
    if us is None:
        return [""] if few else ["", ""]
    if few:
        return [f"{100 * row['n'] * row['k'] / 2 / (us * 1e-6) / row['run']['read_bandwidth']:.0f}%"]
    flops = 2 * row["m"] * row["n"] * row["k"] / (us * 1e-6)
    return [f"{flops / 1e12:.0f}", f"{100 * flops / row['run']['matmul_flops']:.0f}%"]


def _means(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for m in sorted({row["m"] for row in rows}):
        some = [row for row in rows if row["m"] == m]
        cells = [f"{m:,}"]
        cells += [_mean((row["us"].get(name) for row in some), len(some), ".1f") for name in OURS]
        cells.append(_mean((_read_share(row) for row in some), len(some), ".0%"))
        cells.append(_mean((row["row"].get("int4") for row in some), len(some), ".1f"))
        cells += [_mean((_ratio(row, name) for row in some), len(some), ".2f") for name in (None, *PEERS)]
        lines.append(cells)
    head = ["rows", *OURS.values(), "of reading", "in a row: int4", "best peer / int4"]
    return _markdown([*head, *(f"{name} / int4" for name in PEERS.values())], lines)


def _read_share(row: dict[str, Any]) -> float | None:
    us = row["us"].get("int4")
    return None if us is None else row["n"] * row["k"] / 2 / (us * 1e-6) / row["run"]["read_bandwidth"]


def _mean(values: Iterable[float | None], wanted: int, form: str) -> str:
    """Give a geometric mean, and of how many products where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = format(math.exp(sum(map(math.log, known)) / len(known)), form)
    return mean if len(known) == wanted else f"{mean} ({len(known)} of {wanted})"


def _ceilings(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for run in runs:
        packages = ", ".join(f"{name} {version}" for name, version in run.get("packages", {}).items())
        lines.append(
            f"- {run['device']}, {run['date']}: reads {run['read_bandwidth'] / 1e12:.2f} TB/s, multiplies "
            f"{_SIDE} matrices at {run['matmul_flops'] / 1e12:.0f} Tflop/s; jax {run['jax']}, {packages}"
        )
    return ["\n".join(lines), _NOTE] if lines else []


_SIDE = "8,192 x 8,192 bfloat16"
_NOTE = (
    'Microseconds, medians. Before "in a row": the kernels alone. From there on: one call of many that follow one '
    "another with different weights, gaps between kernels included (ours in one XLA program, others as a CUDA graph). "
    "Ratios are of times in a row: above 1, ours is faster."
)


def _failures(results: dict[str, Any]) -> str:
    """List each reason once, with the number of products that it befell."""
    counts: dict[tuple[str, str], int] = {}
    for entry in results["int4_matmul"]:
        for name, why in entry.get("failures", {}).items():
            counts[name, why] = counts.get((name, why), 0) + 1
    for entry in results["peers"]:
        why = entry.get("failure")
        if why is None and not entry["error"] < _TOLERANCE:
            why = f"wrong by {entry['error']:.1e}"
        if why is not None:
            counts[entry["method"], why] = counts.get((entry["method"], why), 0) + 1
    lines = [
        f"- {name}, {count} {'product' if count == 1 else 'products'}: {why}" for (name, why), count in counts.items()
    ]
    return "\n".join(lines)


def _us(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tables", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON file that `pallas_kernels.bench` wrote")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=[], help="models, all by default")
    flags = parser.parse_args()
    results = json.loads(flags.results.read_text(encoding="utf-8"))
    if "runs" not in results:
        parser.error(f"{flags.results} holds no results of `python -m pallas_kernels.bench`: expected `runs` in it")
    print(render(results, flags.shapes))


if __name__ == "__main__":
    main()
