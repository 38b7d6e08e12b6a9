"""What every command line of the project shares: one line for a user's mistake, exit status 2, no traceback."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and leave the process with its exit status.

    A mistake of the user (`ValueError`, or an `OSError` about an input) is printed as `error: ...` on one line of
    stderr and gives status 2. Anything else is a defect and keeps its traceback; `SPEAR_JAX_TRACEBACK=1` keeps all.
    """
    if os.environ.get("SPEAR_JAX_TRACEBACK"):
        sys.exit(main() or 0)
    try:
        status = main() or 0
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): not an error, but nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def parse_flags[T](
    cls: type[T],
    *,
    prog: str | None = None,
    args: Sequence[str] | None = None,
    default: T | None = None,
    description: str | None = None,
) -> T:
    """Read a config dataclass from the command line; `--help` prints the help and leaves with status 0.

    `default` holds the values of flags that are not given; without it they are the dataclass's own. `description`
    heads the help; without it the dataclass's docstring does.

    Raises:
        ValueError: A flag is unknown, or its value is; one line without the box that tyro draws around it.
    """
    import tyro

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            if default is None:
                return tyro.cli(cls, prog=prog, args=args, description=description)
            return tyro.cli(cls, prog=prog, args=args, default=default, description=description)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        inside = (line.strip("│ ") for line in printed.getvalue().splitlines() if line.startswith("│"))
        message = " ".join(itertools.takewhile(lambda line: not line.startswith("───"), inside))
        raise ValueError(f"{message or printed.getvalue()} (see --help)") from None


def cache_dir() -> Path:
    """Give the folder for compiled programs and the like: `$XDG_CACHE_HOME/spear-jax`, or `~/.cache/spear-jax`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spear-jax"
