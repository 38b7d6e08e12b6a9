"""The command lines of tuning and timing, as far as they go without a GPU."""

import json

import pytest

from pallas_kernels import bench, tune, tune_tails, tune_tpu, tuning
from pallas_kernels.tpus import GENERATIONS


@pytest.mark.parametrize("command", [tune, tune_tails, bench])
def test_a_machine_without_a_gpu_is_refused(command, monkeypatch, capsys):
    arguments = ["int4_matmul"] if command is bench else []
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert "the backend is cpu" in capsys.readouterr().err


def test_entries_replace_those_of_the_same_key(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune", "--rows", "1"])
    key = {"tile_m": 8, "n": 64, "k": 64, "groups": 1, "rank": 0}
    tune.write(tmp_path, [{"key": key, "config": {"tile_m": 8}, "us": 2.0}])
    tune.write(tmp_path, [{"key": key | {"n": 128}, "config": {"tile_m": 8}, "us": 3.0}])
    file = tune.write(tmp_path, [{"key": key, "config": {"tile_m": 8, "splits": 2}, "us": 1.0}])
    table = json.loads(file.read_text())
    assert file == tmp_path / tuning.device_name() / "int4_matmul.json"
    assert table["command"] == "python -m pallas_kernels.tune --rows 1"
    assert sorted(entry["us"] for entry in table["entries"]) == [1.0, 3.0]


def test_choices_are_shown(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--show", "nvidia-h100-80gb-hbm3", "--rows", "32", "33"])
    tune.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| weight | rows | from | tile_m | row_tiles")
    assert any(line.startswith("| gate_up | 32 | tuned | 32 | 4 | 1 | 1 |") for line in lines)
    monkeypatch.setattr("sys.argv", ["tune", "--show", "unknown", "--rows", "16"])
    tune.main()
    assert "| gate_up | 16 | rule | 16 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", GENERATIONS)
def test_what_is_stored_for_a_tpu_is_what_the_model_chooses(name: str, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune_tpu", "--rows", "16"])
    file = tune_tpu.write(tmp_path, GENERATIONS[name], [16])
    chosen = json.loads(file.read_text())
    assert chosen["measured"] is False
    stored = tuning.read_table("int4_matmul", tuning.device_name(GENERATIONS[name].kinds[0]))
    for entry in chosen["entries"]:
        key = ",".join(f"{part}={value}" for part, value in sorted(entry["key"].items()))
        assert stored[key] == entry["config"], key


def test_decode_moves_little_more_than_the_codes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune_tpu"])
    with pytest.raises(SystemExit):
        tune_tpu.main()
    assert "give --table or --output" in capsys.readouterr().err
    lines = tune_tpu.table(["llama-3.1-8b"], [1, 16]).splitlines()[2:]
    assert len(lines) == 2 * len(GENERATIONS)
    assert all(float(line.split("|")[6]) < 1.1 for line in lines)
