"""The table of a profile's kernels, from a profile made here."""

import gzip
import json

import pytest

from serve.profile_table import read_launches, table


@pytest.fixture
def profile(tmp_path):
    names = [
        ("process_name", 1, 0, "/device:GPU:0"),
        ("thread_name", 1, 7, "Stream #7"),
        ("thread_name", 1, 8, "XLA Ops"),
    ]
    names += [("process_name", 2, 0, "/host:CPU")]
    events = [{"ph": "M", "name": kind, "pid": p, "tid": t, "args": {"name": label}} for kind, p, t, label in names]
    kernels = [
        ("b", 30.0, 4.0, 1, 7),
        ("a", 10.0, 2.0, 1, 7),
        ("a", 20.0, 6.0, 1, 7),
        ("op", 1.0, 99.0, 1, 8),
        ("h", 1.0, 9.0, 2, 1),
    ]
    events += [{"ph": "X", "name": n, "ts": ts, "dur": us, "pid": p, "tid": t} for n, ts, us, p, t in kernels]
    file = tmp_path / "plugins" / "run" / "host.trace.json.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return tmp_path


def test_kernels_are_read_in_order_and_nothing_else(profile):
    assert [(launch.name, launch.us) for launch in read_launches(profile)] == [("a", 2.0), ("a", 6.0), ("b", 4.0)]


def test_shares(profile):
    lines = table(read_launches(profile), steps=2).splitlines()
    assert lines[2:] == ["| a | 4 | 1 | 4.0 | 67% |", "| b | 2 | 0.5 | 4.0 | 33% |", "| all | 6 | 1.5 | | 100% |"]


def test_a_folder_without_a_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no profile"):
        read_launches(tmp_path)
