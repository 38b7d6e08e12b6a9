"""Tables made from results."""

import json
from pathlib import Path

import pytest

from pallas_kernels import tables

RUN = {
    "date": "2026-11-25T00:00:00+00:00",
    "device": "NVIDIA H200",
    "jax": "0.11.2",
    "packages": {"torch": "2.11.0"},
    "read_bandwidth": 4.0e12,
    "matmul_flops": 700e12,
}


def ours(weight: str, n: int, k: int, m: int, us: float, **more) -> dict:
    name = {"run": 0, "model": "llama-3.1-8b", "weight": weight, "m": m, "n": n, "k": k, "group": -1, "rank": 16}
    times = {"us": {"bf16": 4 * us, "xla_int4": 9 * us, "int4": us}, "us_in_a_row": {"int4": us + 1}}
    return name | times | {"error": {}, "failures": {}} | more


def peer(method: str, weight: str, m: int, us: float, error: float = 1e-3, **more) -> dict:
    name = {"run": 0, "method": method, "model": "llama-3.1-8b", "weight": weight, "m": m, "n": 1, "k": 1}
    return name | (more or {"us_in_a_row": us, "error": error})


@pytest.fixture
def results() -> dict:
    return {
        "runs": [RUN],
        "int4_matmul": [
            ours("o", 4096, 4096, 1, 4.0),
            ours("qkv", 6144, 4096, 1, 9.0),
            ours("o", 4096, 4096, 2048, 200.0, failures={"int4_ec": "wrong by 1.0e+00"}),
        ],
        "peers": [
            peer("torch_bf16", "o", 1, 15.0),
            peer("humming_channel", "o", 1, 6.0),
            peer("humming_128", "o", 1, 1.0, error=0.5),
            peer("gemlite_128", "o", 1, 0.0, failure="gemlite cannot be used: ModuleNotFoundError"),
            peer("gemlite_128", "qkv", 1, 0.0, failure="gemlite cannot be used: ModuleNotFoundError"),
            peer("torch_bf16", "o", 2048, 180.9),
        ],
    }


def lines_of(text: str, heading: str) -> list[list[str]]:
    """Give the cells of the table under a heading."""
    table = text.split(f"### {heading}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_few_rows_are_held_to_reading(results):
    head, _, first, second = lines_of(tables.render(results), "llama-3.1-8b, one scale a channel, few rows")
    cells = dict(zip(head, first, strict=True))
    assert cells["weight [N, K]"] == "o [4096, 4096]"
    assert (cells["XLA bf16"], cells["int4"], cells["in a row: int4"]) == ("16.0", "4.0", "5.0")
    assert cells["of reading"] == f"{100 * 4096 * 4096 / 2 / 4e-6 / 4e12:.0f}%"
    # Humming's other method is wrong, and counts for nothing.
    assert cells["best peer / int4"] == "1.20 (Humming)"
    assert cells["cuBLAS / int4"] == "3.00"
    assert dict(zip(head, second, strict=True))["best peer / int4"] == ""
    assert "GemLite, 128" not in head


def test_many_rows_are_held_to_multiplying(results):
    head, _, row = lines_of(tables.render(results), "llama-3.1-8b, one scale a channel, many rows")
    cells = dict(zip(head, row, strict=True))
    flops = 2 * 2048 * 4096 * 4096 / 200e-6
    assert (cells["rows"], cells["Tflop/s"]) == ("2,048", f"{flops / 1e12:.0f}")
    assert cells["of matmul"] == f"{100 * flops / 700e12:.0f}%"
    assert cells["cuBLAS / int4"] == "0.90"


def test_means_are_geometric_and_say_what_is_missing(results):
    head, _, few, many = lines_of(tables.render(results), "llama-3.1-8b, one scale a channel, geometric means")
    cells = dict(zip(head, few, strict=True))
    assert (cells["rows"], cells["int4"], many[0]) == ("1", "6.0", "2,048")
    assert cells["best peer / int4"] == "1.20 (1 of 2)"


def test_failures_are_listed_once_with_their_number(results):
    text = tables.render(results)
    assert "- gemlite_128, 2 products: gemlite cannot be used: ModuleNotFoundError" in text
    assert "- humming_128, 1 product: wrong by 5.0e-01" in text
    assert "- int4_ec, 1 product: wrong by 1.0e+00" in text
    assert "reads 4.00 TB/s" in text
    assert "torch 2.11.0" in text


def test_models_without_results_have_no_table(results):
    assert "qwen" not in tables.render(results)
    assert tables.render(results, ["llama-2-13b"]).count("###") == 2  # means and failures


def test_there_may_be_nothing():
    assert tables.render({"runs": [], "int4_matmul": [], "peers": []}) == ""


def test_the_command_prints_tables(results, tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["tables", str(file), "--shapes", "llama-3.1-8b"])
    tables.main()
    assert capsys.readouterr().out.strip() == tables.render(results, ["llama-3.1-8b"])
    file.write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        tables.main()
    assert stopped.value.code == 2
    assert "holds no results" in capsys.readouterr().err
