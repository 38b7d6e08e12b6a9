"""What a calibration shows while it runs, on stderr."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

type Report = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_LINE_SECONDS = 30
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


class Stages:
    """Shows and times the stages of a run: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def __enter__(self) -> "Stages":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Time a stage; gives what to call with its progress."""
        row = self._bars.add_task(name, total=None)
        begin = last = time.perf_counter()

        def report(done: int, total: int) -> None:
            nonlocal last
            self._bars.update(row, completed=done, total=total)
            if not self.console.is_terminal and time.perf_counter() - last > _LINE_SECONDS:
                last = time.perf_counter()
                self.say(f"{name}: {done} of {total}")

        try:
            yield report
        finally:
            self._bars.remove_task(row)
        seconds = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.say(f"{name}: {seconds:.1f} s")

    def resumed(self, name: str, seconds: float, *, what: str = "done before") -> None:
        """Say that a stage, or its beginning, was found on disk, and count the seconds it had taken."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.say(f"{name}: {what} ({seconds:.1f} s)")

    def say(self, message: str) -> None:
        """Print a line."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)
