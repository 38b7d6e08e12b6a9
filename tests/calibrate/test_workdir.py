import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from calibrate.workdir import Key, WorkDirectory

TREE = {"a": {"b": jnp.arange(6, dtype=jnp.float32)}, "c": jnp.full((2, 3), 1.5, jnp.bfloat16), "d": jnp.int32(4)}


def test_a_tree_comes_back_with_types_and_values(tmp_path):
    work, key = WorkDirectory(tmp_path / "work"), Key.first(x=1)
    assert work.load("stage", key) is None
    work.save("stage", key, TREE, seconds=2.5)
    saved = work.load("stage", key)
    assert saved.values == {"seconds": 2.5}
    found = saved.tree(TREE)
    assert found["c"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["a"]["b"], TREE["a"]["b"])
    np.testing.assert_array_equal(found["c"], TREE["c"])
    assert [path.suffix for path in (tmp_path / "work").iterdir()] == [".npz"]


def test_keys_depend_on_everything_before():
    a, b = Key.first(x=1), Key.first(x=2)
    assert a.then(y=1) == Key.first(x=1).then(y=1)
    assert len({a, b, a.then(y=1), a.then(y=2), b.then(y=1)}) == 5


def test_another_shape_is_refused(tmp_path):
    work, key = WorkDirectory(tmp_path), Key.first()
    work.save("stage", key, TREE)
    with pytest.raises(ValueError, match="does not fit: d"):
        work.load("stage", key).tree(TREE | {"d": jnp.zeros(2)})


def test_a_damaged_file_is_named(tmp_path):
    work, key = WorkDirectory(tmp_path), Key.first()
    work.save("stage", key, TREE)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{file.name}: damaged"):
        work.load("stage", key)


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    work, key = WorkDirectory(tmp_path), Key.first()
    work.save("stage", key, TREE, step=1)

    def full(stream, **_):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"stage-.*npz: cannot be written: No space left"):
        work.save("stage", key, TREE, step=2)
    assert work.load("stage", key).values == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_left_is_removed(tmp_path):
    work, key = WorkDirectory(tmp_path), Key.first()
    work.save("stage", key, TREE)
    (file,) = tmp_path.iterdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for process in (gone.pid, os.getppid()):
        (tmp_path / f".{file.name}.partial-{socket.gethostname()}-{process}").write_bytes(b"half")
    work.save("stage", key, TREE, step=2)
    left = {path.name.rpartition("-")[2] for path in tmp_path.iterdir() if path != file}
    assert left == {str(os.getppid())}, "a writer that runs keeps what it writes to"
