"""`python -m serve.profile_table DIR --steps 20`: what kernels take in a profile of `serve.bench_step --profile`.

Times of kernels whose launches overlap hold their waiting for the one before: sums are the device's time all the same.
"""

import argparse
import collections
import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel on the device: its name, and when it began and how long it ran, in microseconds."""

    name: str
    begin: float
    us: float


def read_launches(folder: Path) -> list[Launch]:
    """Read the kernels of the newest profile under a folder, in order.

    Raises:
        ValueError: There is no profile, or it has no kernels of a GPU.
    """
    files = sorted(folder.rglob("*.trace.json.gz"))
    if not files:
        raise ValueError(f"{folder} holds no profile (*.trace.json.gz)")
    events = json.loads(gzip.decompress(files[-1].read_bytes()))["traceEvents"]
    labels = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") in ("process_name", "thread_name")
    }
    processes = {pid: label for (kind, pid, _), label in labels.items() if kind == "process_name"}

    def on_device(event: dict) -> bool:
        thread = labels.get(("thread_name", event["pid"], event.get("tid")), "")
        return event.get("ph") == "X" and "GPU" in processes.get(event["pid"], "") and "Stream" in thread

    launches = [Launch(name=e["name"], begin=e["ts"], us=e["dur"]) for e in events if on_device(e)]
    if not launches:
        raise ValueError(f"{files[-1]} has no kernels of a GPU")
    return sorted(launches, key=lambda launch: launch.begin)


def table(launches: Sequence[Launch], *, steps: int, most: int = 12) -> str:
    """Give the kernels that take longest as a table in Markdown: times a step, launches a step, means and shares."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for launch in launches:
        times[launch.name].append(launch.us)
    busy = sum(launch.us for launch in launches)
    lines = ["| kernel | us a step | launches a step | mean us | share |", "|---|---|---|---|---|"]
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:most]:
        cells = [f"{sum(each) / steps:.0f}", f"{len(each) / steps:g}", f"{sum(each) / len(each):.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(each) / busy:.0%} |")
    lines.append(f"| all | {busy / steps:.0f} | {len(launches) / steps:g} | | 100% |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m serve.profile_table", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of one case, as `serve.bench_step --profile` writes it")
    parser.add_argument("--steps", type=int, required=True, help="steps that were profiled")
    parser.add_argument("--sequence", type=int, default=0, help="print so many launches from the middle, in order")
    flags = parser.parse_args()
    try:
        launches = read_launches(flags.folder)
    except ValueError as wrong:
        parser.error(str(wrong))
    print(table(launches, steps=flags.steps))
    middle = len(launches) // 2
    for launch in launches[middle : middle + flags.sequence]:
        print(f"{launch.us:8.2f} us  {launch.name}")


if __name__ == "__main__":
    main()
