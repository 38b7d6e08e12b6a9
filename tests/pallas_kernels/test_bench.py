"""Timing of int4 products as far as it goes without a GPU: kernels and clocks are replaced, all else runs."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, shapes, timing, tune
from pallas_kernels.int4_matmul.gpu import choose_config
from pallas_kernels.int4_matmul.reference import int4_matmul_xla

SMALL = {"llama-3.1-8b": {"o": (64, 128), "down": (128, 256)}}


@pytest.fixture
def without_gpu(monkeypatch):
    """Runs what a GPU would run by XLA, and gives every measurement the time of 2 us."""

    def ours(*operands, layout, config):
        assert not config.overlap
        return int4_matmul_xla(*operands, layout=layout)

    monkeypatch.setattr(bench, "int4_matmul_mosaic_gpu", ours)
    monkeypatch.setattr(bench, "kernel_microseconds", lambda *_, **__: 2.0)
    monkeypatch.setattr(
        bench, "int4_matmul", lambda *args, **kwargs: tune.int4_matmul(*args, **kwargs | {"implementation": "xla"})
    )
    monkeypatch.setattr(shapes, "CACHE_BYTES", 2**12)
    monkeypatch.setattr(bench, "SHAPES", SMALL)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command line in this process as if there were a GPU, which takes 2 us; gives its results."""

    def product(problem, *, rank, seed, threads):
        times = {"error": {"int4": 1e-3}, "us": {"int4": 2.0}, "us_in_a_row": {"int4": 3.0}, "failures": {}}
        return vars(problem) | {"rank": rank} | times

    monkeypatch.setattr(bench, "bench_int4_matmul", product)
    monkeypatch.setattr(bench, "SHAPES", SMALL)
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "gpu")
    for ceiling in ("read_bandwidth", "matmul_flops"):
        monkeypatch.setattr(bench, ceiling, lambda: 1e12)
    path = tmp_path / "out" / "results.json"

    def run(*arguments):
        given = ["int4_matmul", "--shapes", "llama-3.1-8b", "--output", str(path), "--compile-threads", "2"]
        monkeypatch.setattr("sys.argv", ["bench", *given, *arguments])
        bench.main()
        return json.loads(path.read_text())

    run.path = path
    return run


@pytest.mark.parametrize("model", shapes.SHAPES)
def test_models_have_four_products_that_can_be_cut_up(model: str):
    products = shapes.SHAPES[model]
    assert list(products) == ["o", "qkv", "down", "gate_up"]
    for n, k in products.values():
        for m in shapes.ROWS:
            choose_config(m, n, k, device="none")
            choose_config(m, n, k, groups=k // 128, device="none")


def test_shapes_of_models():
    assert shapes.SHAPES["llama-3.2-1b"]["qkv"] == (2048 + 2 * 8 * 64, 2048)
    assert shapes.SHAPES["qwen2.5-7b"]["gate_up"] == (2 * 18944, 3584)
    assert shapes.SHAPES["llama-2-13b"]["qkv"] == (3 * 5120, 5120)
    # Columns divided among two devices halve N, rows halve K.
    assert shapes.SHAPES["llama-3.1-70b-tp2"] == {
        "o": (8192, 8192 // 2),
        "qkv": ((8192 + 2 * 8 * 128) // 2, 8192),
        "down": (8192, 28672 // 2),
        "gate_up": (28672, 8192),
    }
    assert sorted(shapes.ROWS) == [1, 4, 8, 16, 32, 64, 128, 512, 2048, 8192]


def test_copies_do_not_fit_into_the_cache():
    assert shapes.copies(2**20) == 120
    assert shapes.copies(2**30) == 2


@pytest.mark.parametrize("group", [-1, 64])
def test_a_product_is_checked_and_timed(without_gpu, group: int):
    problem = tune.Problem(m=4, n=128, k=256, group=group)
    result = bench.bench_int4_matmul(problem, rank=4, seed=7, threads=2)
    assert result["failures"] == {}
    assert set(result["us"]) == {"bf16", "xla_int4", "int4", "int4_ec", "int4_ec_with_z"} == set(result["error"])
    assert all(0 < error < 1e-2 for error in result["error"].values())
    assert set(result["us_in_a_row"]) == {"int4", "int4_ec", "int4_ec_with_z"}
    assert all(us > 0 for us in result["us_in_a_row"].values())
    json.dumps(result)


def test_a_wrong_result_has_no_time(without_gpu, monkeypatch):
    monkeypatch.setattr(
        bench, "int4_matmul_mosaic_gpu", lambda *args, layout, config: 1.1 * int4_matmul_xla(*args, layout=layout)
    )
    result = bench.bench_int4_matmul(tune.Problem(m=1, n=64, k=128), rank=4, seed=0, threads=1)
    assert set(result["us"]) == {"bf16", "xla_int4"}
    assert "wrong by 1.0" in result["failures"]["int4"] or "wrong by 9" in result["failures"]["int4"]


def test_a_variant_that_does_not_compile_says_so(without_gpu, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no such cut")

    monkeypatch.setattr(bench, "int4_matmul_mosaic_gpu", refuse)
    result = bench.bench_int4_matmul(tune.Problem(m=1, n=64, k=128), rank=4, seed=0, threads=1)
    assert result["failures"]["int4"] == "NotImplementedError: no such cut"
    assert set(result["us"]) == {"bf16", "xla_int4"}


def test_results_go_to_the_file_and_are_continued(command, capsys):
    table = command("--rows", "1", "4", "--peers", "--seed", "5")
    assert [(one["weight"], one["m"]) for one in table["int4_matmul"]] == [("o", 1), ("down", 1), ("o", 4), ("down", 4)]
    assert table["runs"][0] | {"seed": 5, "read_bandwidth": 1e12, "matmul_flops": 1e12} == table["runs"][0]
    assert "### llama-3.1-8b, one scale a channel, few rows" in capsys.readouterr().out
    table = command("--rows", "1", "8", "--peers", "--skip-done", "--weights", "o")
    assert [(one["m"], one["run"]) for one in table["int4_matmul"]] == [(1, 0), (1, 0), (4, 0), (4, 0), (8, 1)]
    assert "o [64, 128] 8 rows" in capsys.readouterr().err
    table = command("--rows", "8", "--peers", "--weights", "o")
    assert [one["run"] for one in table["int4_matmul"]] == [0, 0, 0, 0, 2]


def test_nothing_begins_after_the_time(command):
    with pytest.raises(SystemExit):
        command("--seconds", "-1")
    assert not command.path.exists()


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_peers_that_are_missing_are_reported(command):
    """There is no PyTorch here: each product of each method says so."""
    table = command("--rows", "1", "--weights", "o", "--peers", "humming", "torch_bf16", "--peer-seconds", "60")
    assert [one["method"] for one in table["peers"]] == ["humming_channel", "humming_128", "torch_bf16"]
    assert all("No module named 'torch'" in one["failure"] for one in table["peers"])
    assert table["runs"][0]["packages"]["humming-kernels"] == "not installed"


def test_results_of_another_device_are_not_mixed_in(command, capsys):
    command("--rows", "1", "--weights", "o", "--peers")
    table = json.loads(command.path.read_text())
    table["runs"][0]["device"] = "abacus"
    command.path.write_text(json.dumps(table))
    with pytest.raises(SystemExit) as stopped:
        command("--rows", "1", "--peers")
    assert stopped.value.code == 2
    assert "holds results of abacus" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    file = tmp_path / "other.json"
    file.write_text('{"runs": 3}')
    with pytest.raises(ValueError, match="holds no results of this command"):
        bench.Results(file, {"device": "here"})


def test_a_peer_with_another_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "int4_matmul", "--peers", "marlin"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "no peer is called 'marlin'" in capsys.readouterr().err


def test_weights_take_turns(monkeypatch):
    """One program is executed for each weight in turn, and the median is of calls."""
    seen = []

    def measure(f, *, aggregate, iterations):
        assert isinstance(f, jax.stages.Wrapped)
        assert not aggregate

        def wrapper():
            seen.extend(float(f()) for _ in range(iterations + 1))
            return None, [[("a", us * 1e-3), ("b", 1e-3)] for us in seen[1:]]

        return wrapper

    monkeypatch.setattr(timing.profiler, "measure", measure)
    weights = [jnp.float32(i) for i in (1, 2, 3)]
    assert timing.kernel_microseconds(lambda weight, x: weight * x, weights, jnp.float32(10), measured=5) == 21
    assert seen == [10, 20, 30, 10, 20, 30, 10]


def test_calls_in_a_row_are_timed():
    run = jax.jit(timing.in_a_row(lambda weight, x: weight + x))
    weights = [jnp.ones(8), jnp.zeros(8)]
    assert [float(y[0]) for y in run(weights, (jnp.ones(8),))] == [2, 1]
    assert 0 < timing.microseconds_in_a_row(run, weights, jnp.ones(8)) < 1e6


def test_help_says_what_it_does():
    assert "--skip-done" in bench._parser().format_help()
    assert sys.executable == bench._parser().parse_args(["int4_matmul"]).peer_python
