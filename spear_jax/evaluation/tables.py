"""Measurements as tables for a reader."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(result: dict[str, Any]) -> None:
    """Draw what the command prints as JSON as a table on stderr."""
    settings, console = result["config"], Console(stderr=True)
    if "arms" in result:
        console.print(_comparison_table(result))
        for note in result["notes"]:
            console.print(f"Note: {note}.")
        return
    how = result["dtype"] if settings["quantize"] == "none" else f"{settings['quantize']}, {result['bits']:.2f} bits"
    if "compensator_bytes" in result:
        how = f"{result['bits']:.2f} bits, compensators {result['overhead_of_model']:.2%} of the model's bytes"
    table = Table("measure", "value", "over", title=f"{result['model']} ({how})")
    for row in _rows(result):
        table.add_row(*row)
    console.print(table)


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Give measure, value, and what it was measured over."""
    if "perplexity" in result:
        yield "perplexity", f"{result['perplexity']:.2f}", f"{result['windows']} windows"
    for name, metrics in result.get("tasks", {}).items():
        for metric in ("acc", "acc_norm", "perplexity"):
            if metric in metrics:
                error = metrics.get(f"{metric}_stderr")
                value = f"{metrics[metric]:.2f}" if error is None else f"{metrics[metric]:.3f} ± {error:.3f}"
                yield f"{name} {metric}", value, f"{metrics['examples']} examples"


def _comparison_table(result: dict[str, Any]) -> Any:
    def share(arm: dict[str, Any], key: str, digits: int) -> str:
        return f"{arm[key]:.{digits}%}" if key in arm else "-"

    arms = result["arms"].values()
    measures = [(row[0], row[2]) for row in _rows(next(iter(arms)))]
    titles = [f"{name} ({over})" for name, over in measures]
    shares = ("of the RTN gap", "of the W4 gap", "of the model's bytes", "of the int4 linears")
    table = Table("arm", *titles, *shares, title=result["model"])
    for arm in arms:
        recovered = (share(arm, f"recovered_of_{base}", 1) for base in ("rtn", "w4"))
        overhead = (share(arm, f"overhead_of_{whole}", 3) for whole in ("model", "linears"))
        table.add_row(arm["label"], *(row[1] for row in _rows(arm)), *recovered, *overhead)
    return table
