"""Files, and directories with a manifest that shows later damage, that are written whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MANIFEST = "manifest.json"


@contextlib.contextmanager
def writing_directory(path: str | Path, *, size: int, overwrite: bool = False) -> Iterator[Path]:
    """Give a place beside `path` to write a directory of `size` bytes to; on leaving it becomes `path`.

    The place does not exist yet. A manifest of its files is added, then it is renamed. If the block raises, it is
    removed and whatever was at `path` stays. What killed writers of `path` on this machine left is removed first. A
    process writes to one `path` once at a time.

    Raises:
        FileExistsError: Something is at `path` that `overwrite` does not allow to replace, or that has no manifest.
        OSError: The disk is full or cannot be written.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    _check_vacant(path, overwrite=overwrite)
    if size > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"{path}: disk full: {size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
    partial = _sibling(path, "partial")
    try:
        yield partial
        (partial / MANIFEST).write_text(json.dumps({"files": _checksums(partial)}, indent=1))
        _move_into_place(partial, path)
    except BaseException as error:
        for leftover in _leftovers(path, "partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        if _is_disk_full(error):
            raise OSError(f"{path}: disk full while writing {size / 1e6:.1f} MB") from error
        raise


@contextlib.contextmanager
def writing_file(path: str | Path) -> Iterator[BinaryIO]:
    """Give a stream whose bytes become the file at `path` on leaving; if the block raises, what was there stays.

    What killed writers of `path` on this machine left is removed first.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _leftovers(path, "partial"):
        leftover.unlink(missing_ok=True)
    partial = _sibling(path, "partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def verify_manifest(path: Path, *, contents: bool) -> None:
    """Compare the files of a directory with its manifest: their sizes, and their checksums if `contents`.

    Raises:
        ValueError: The manifest cannot be read, or a file is missing, of another size, or changed; names the file.
    """
    try:
        files: dict[str, list[int]] = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (size, checksum) for name, (size, checksum) in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged: {MANIFEST} cannot be read") from None
    for name, (size, checksum) in expected.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{path}: damaged: {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{path}: damaged: {name} has {file.stat().st_size} bytes, expected {size}")
        if contents and file_checksum(file) != checksum:
            raise ValueError(f"{path}: damaged: {name} has changed since it was written (checksum)")


def file_checksum(file: Path) -> int:
    """Compute the CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _checksums(directory: Path) -> dict[str, tuple[int, int]]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): (file.stat().st_size, file_checksum(file)) for file in files}


def _check_vacant(path: Path, *, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / MANIFEST).exists():
        raise FileExistsError(f"{path}: already exists, and was not written by spear-jax: give another path")
    if not overwrite:
        raise FileExistsError(f"{path}: already exists: give another path, or allow overwriting")


def _move_into_place(partial: Path, path: Path) -> None:
    """Rename; a directory that is replaced is set aside until the new one is in its place."""
    if not (path / MANIFEST).exists():
        partial.rename(path)
        return
    replaced = _sibling(path, "replaced")
    path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        replaced.rename(path)
        raise
    shutil.rmtree(replaced)


def _remove_leftovers(path: Path) -> None:
    """Remove what dead writers of `path` on this machine left; what one had set aside goes back if nothing is there."""
    for leftover in _leftovers(path, "replaced"):
        if path.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.rename(path)
    for leftover in _leftovers(path, "partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(path: Path, state: str) -> list[Path]:
    """List siblings written for `path` by this process, or by processes that no longer run.

    Orbax writes to siblings of its own first, named like the one it was given and `.orbax-checkpoint-tmp`.
    """
    prefix = f".{path.name}.{state}-{socket.gethostname()}-"
    found = []
    for sibling in path.parent.iterdir():
        process = sibling.name.removeprefix(prefix).partition(".")[0]
        if sibling.name.startswith(prefix) and process.isdigit() and not _is_other(int(process)):
            found.append(sibling)
    return found


def _sibling(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}-{socket.gethostname()}-{os.getpid()}")


def _is_other(process: int) -> bool:
    """Say whether a process runs and is not this one, whose number a dead one may have had: often so in containers."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_disk_full(error: BaseException) -> bool:
    """Say whether an error means that there is no room, be it of the system or passed on as text by TensorStore."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))
