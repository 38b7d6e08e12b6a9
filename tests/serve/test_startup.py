"""What the server makes of a model at load, and what a start shows."""

import dataclasses
import io
import json
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from pallas_kernels.int4_matmul import Compensator, Gate, int4_matmul
from serve import startup
from serve.bench import BenchConfig, bench
from serve.config import SchedulerConfig, ServeConfig
from serve.cpu import cpu_logits
from serve.latency import load_profile
from serve.profile import correction_scores, profile
from serve.startup import Phases, Prepared, kernels_used, plan_cache, prepare, recovers, table_path
from spear_jax.checkpoint import load_checkpoint, save_checkpoint
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model, quantize_tables
from spear_jax.quant import CompensatorBank, QuantSpec
from spear_jax.testing import assert_close, random_weights, tiny_config

PROMPT = "w5 w17 w80 w33 w2"


def compensated_model() -> Decoder:
    """A model as calibration leaves it: int4, and compensators whose ranks differ from layer to layer."""
    config = tiny_config(tie_embeddings=False)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32)

    model = quantize_model(Decoder.from_weights(config, random_weights(config), dtype=jnp.float32), QuantSpec())
    for name, ranks in {"qkv": (1, 0, 2), "down": (0, 3, 1)}.items():
        n, k = config.module_shapes()[name]
        t = sum(ranks)
        gate = Gate(w_in=draw(t, 4), b_in=draw(3, 4), w_out=draw(t, 4), b_out=draw(t))
        model.compensators[name] = CompensatorBank(ranks, draw(t, k), draw(t, n), gate=gate).to_int8()
    return model


def logits(model: Decoder, of: Callable[..., Any] = Decoder.logits) -> jax.Array:
    return jax.jit(lambda m: of(m, m(np.arange(2, 20, dtype=np.int32)[None])[0]))(model)


@pytest.mark.parametrize("embedding", ["keep", "int8"])
@pytest.mark.parametrize("weights", ["auto", "expanded", "packed"])
@pytest.mark.parametrize("source", ["dense", "dense, not quantized", "checkpoint"])
def test_however_a_model_is_laid_out_it_computes_the_same(source: str, weights: Any, embedding: Any) -> None:
    config = tiny_config(tie_embeddings=False)
    model = Decoder.from_weights(config, random_weights(config), dtype=jnp.float32)
    settings = ServeConfig(quantize="none" if "not" in source else "rtn", weights=weights, embedding=embedding)
    expected = model = compensated_model() if source == "checkpoint" else model
    if source == "dense":
        expected = quantize_model(model, QuantSpec(group_size=32))
    if embedding == "int8":
        expected = quantize_tables(expected)
    laid_out, description, dense = prepare(model, settings)
    assert ("int4" in description) == ("not" not in source)
    assert ("error compensators" in description) == (source == "checkpoint")
    assert_close(logits(laid_out, cpu_logits if dense else Decoder.logits), logits(expected), relative=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"model": "org/name"}, False),
        ({"quantize": "rtn"}, False),
        ({"quantize": "none"}, False),
        ({"group_size": 32}, False),
    ],
)
def test_only_the_demo_by_default_is_served_as_recovered(settings: dict[str, Any], expected: bool) -> None:
    assert recovers(ServeConfig(**settings)) is expected


def test_a_start_shows_what_is_being_compiled_and_logs_each_phase(caplog: pytest.LogCaptureFixture) -> None:
    screen = io.StringIO()
    caplog.set_level("INFO", logger="serve")
    with Phases(Console(file=screen, force_terminal=True)) as phases, phases.phase("compile", steps=2):
        phases.advance("compiled prefill 64")
        phases.advance("compiled decode 8")
        time.sleep(0.5)  # redrawn ten times a second
    assert "compiled decode 8" in screen.getvalue()
    assert "2/2" in screen.getvalue()
    assert [record.message.split(":")[0] for record in caplog.records] == ["compile"]


def test_a_start_knows_which_kernels_it_uses() -> None:
    def product(x: jax.Array) -> jax.Array:
        return int4_matmul(x, jnp.ones((8, 16), jnp.int8), jnp.ones((8, 1)))

    with kernels_used() as used, ThreadPoolExecutor(1) as pool:
        pool.submit(jax.jit(product), jnp.ones((1, 32))).result()
    jax.jit(product)(jnp.ones((2, 32)))
    assert used == {"int4_matmul by xla"}


def write_tiny(folder: Path) -> tuple[Decoder, PreTrainedTokenizerFast]:
    """Write what a calibration of a tiny model would."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 96)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    model = compensated_model()
    save_checkpoint(folder / "checkpoint", model, tokenizer, name="tiny")
    return model, tokenizer


@pytest.mark.timeout(300)
def test_what_calibration_wrote_is_served(tmp_path: Path, launch_server: Callable[..., Any]) -> None:
    model, tokenizer = write_tiny(tmp_path / "out")
    server = launch_server("--model", str(tmp_path / "out"), "--max-context", "64", "--compilation-cache", "none")
    server.wait_for_log("ready: ", seconds=200)
    assert "with error compensators of" in "".join(server.log)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text = json.load(response)["choices"][0]["text"]
    assert server.metric("compilations_after_ready_total") == 0
    model = load_checkpoint(tmp_path / "out" / "checkpoint").model
    tokens: list[int] = tokenizer.encode(PROMPT)
    for _ in range(8):
        hidden, _ = model(jnp.asarray([tokens]))
        tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    assert text.split() == [f"w{token}" for token in tokens[-8:] if token > 1]


def test_the_bench_says_in_one_line_that_there_is_no_server() -> None:
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:1: "):
        bench(BenchConfig(url="http://127.0.0.1:1"))


@pytest.mark.slow
def test_a_profile_lies_beside_its_checkpoint_and_limits_are_kept_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "out")
    limits = SchedulerConfig(itl_slo_ms=10_000.0, admission="refuse", compensator_sets=3)
    serve = ServeConfig(
        model=str(tmp_path / "out"), max_context=96, prefill_buckets=(8, 16), max_slots=2, scheduler=limits
    )
    load = BenchConfig(serve=serve, load="poisson", rates=(30.0,), requests=6, prompt_tokens=20, tokens=5)
    with pytest.raises(FileNotFoundError, match="serve profile"):
        bench(load)
    profile(serve)
    path = table_path(serve)
    assert path is not None
    assert path.parent == tmp_path / "out"
    measured = load_profile(path)
    assert set(measured.kept[0]) == {"qkv", "down"}
    assert [len(names) for names in measured.kept] == [2, 1, 0]
    assert measured.table.seconds.shape == (3, 3, 3, 3)
    assert measured.table.seconds[:, 1:].min() > 0
    capsys.readouterr()
    bench(load)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["requests"], result["refused"], result["attained"]) == (6, 0, 1.0)
    assert result["output_tokens_per_second"] == pytest.approx(30 / result["seconds"])
    with pytest.raises(ValueError, match="slots 2, now 3"):
        bench(dataclasses.replace(load, serve=dataclasses.replace(serve, max_slots=3)))


def test_the_size_of_a_correction_is_that_of_its_product() -> None:
    def product(one: Compensator) -> np.ndarray:
        a, bt, a_scale, bt_scale = (np.asarray(x, np.float64) for x in (one.a, one.bt, one.a_scale, one.bt_scale))
        return (bt * bt_scale[:, None]).T @ (a * a_scale[:, None])

    banks = compensated_model().compensators
    ones = {name: [one for i in range(3) if (one := bank.at(i)) is not None] for name, bank in banks.items()}
    expected = {name: sum(np.linalg.norm(product(one)) for one in some) for name, some in ones.items()}
    assert correction_scores(banks) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_an_architecture_is_measured_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tmp_path / "tiny.yaml"
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    sizes = {name: getattr(tiny_config(), name) for name in ("family", *names, "max_position")}
    shape.write_text("".join(f"{name}: {value}\n" for name, value in sizes.items()))
    table = SchedulerConfig(latency_table="none")
    serve = ServeConfig(
        model=f"random:{shape}", max_context=64, prefill_buckets=(8,), max_slots=2, group_size=32, scheduler=table
    )
    bench(BenchConfig(serve=serve, load="fixed", rates=(50.0,), requests=3, prompt_tokens=9, tokens=4))
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["requests"], result["refused"]) == (3, 0)
    assert result["output_tokens_per_second"] == pytest.approx(12 / result["seconds"])


def prepared(context: int) -> Prepared:
    model = Decoder.from_weights(tiny_config(), random_weights(tiny_config()), dtype=jnp.float32)
    return Prepared(
        model=model, mesh=None, name="m", tokenizer=None, architecture=model.config, description="", dense=False,
        context=context, scores={},
    )  # fmt: skip


def test_the_size_of_the_cache_is_what_was_asked_for_or_what_all_slots_fill() -> None:
    config = ServeConfig(max_slots=3)
    plan = plan_cache(prepared(100), config)
    assert (plan.pages, plan.context) == (1 + 3 * 2, 100)
    assert (
        plan.page_bytes == 2 * 4 * 64 * tiny_config().num_layers * tiny_config().num_kv_heads * tiny_config().head_dim
    )
    assert "6 pages, 384 tokens" in str(plan)
    half = dataclasses.replace(config, kv_cache_gib=3.5 * plan.page_bytes / 2**30)
    assert (plan_cache(prepared(1000), half).pages, plan_cache(prepared(1000), half).context) == (3, 128)
    smaller = plan_cache(prepared(1000), dataclasses.replace(half, kv_cache_dtype="int8"))
    assert smaller.page_bytes < 0.4 * plan.page_bytes
    with pytest.raises(ValueError, match=r"room for 128 tokens, 200 are needed.*kv_cache_gib"):
        plan_cache(prepared(200), dataclasses.replace(half, max_context=200))
    with pytest.raises(ValueError, match="room for 0 tokens"):
        plan_cache(prepared(200), dataclasses.replace(config, kv_cache_gib=1e-9))
    with pytest.raises(ValueError, match="kv_cache_gib must be positive"):
        dataclasses.replace(config, kv_cache_gib=0.0).check()


def test_or_on_an_accelerator_what_weights_and_programs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 100 * 2**20, "bytes_in_use": 40 * 2**20}

    class Dry:
        def temporary_bytes(self) -> int:
            return 15 * 2**20

    sizes: list[int] = []
    monkeypatch.setattr(startup, "make_runner", lambda *_, pages, kept: sizes.append(pages) or Dry())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    plan = plan_cache(prepared(100), ServeConfig())
    assert sizes == [2], "the server that is tried has next to no cache"
    assert plan.pages - 2 == 40 * 2**20 // plan.page_bytes
