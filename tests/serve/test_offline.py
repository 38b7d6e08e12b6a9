"""`LLM` and batches: the server's answers without a server, and batches that go on after a kill."""

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import tokenizers
from rich.progress import Progress
from transformers import PreTrainedTokenizerFast

from serve.batch import Results, answer_all
from serve.reload import Reloader
from spear_jax import LLM
from spear_jax.checkpoint import save_checkpoint
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import quantize_model
from spear_jax.quant import QuantSpec
from spear_jax.testing import random_weights, tiny_config

SETTINGS: dict[str, Any] = {"max_context": 64, "max_slots": 2, "prefill_buckets": (8,), "compilation_cache": "none"}
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def write(folder: Path, *, seed: int = 0, group_size: int = 32, words: int = 96) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    config = tiny_config(tie_embeddings=False)
    model = Decoder.from_weights(config, random_weights(config, seed=seed), dtype=jnp.float32)
    spec = QuantSpec(group_size=group_size)
    save_checkpoint(folder, quantize_model(model, spec), tokenizer, name="tiny")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), **SETTINGS) as llm:
        yield llm


def test_prompts_are_answered_in_their_order(llm: LLM) -> None:
    options = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    prompts = [f"w{i} w{2 * i}" for i in range(2, 20)]
    together = llm.generate(prompts, **options)
    assert [llm.generate(prompt, **options) for prompt in prompts[:4]] == together[:4]
    assert len({answer.text for answer in together}) > 4
    assert {(answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) for answer in together} == {
        ("length", 2, 6)
    }
    assert llm.generate([4, 8], **options) == llm.generate([[4, 8]], **options)[0] == llm.generate("w4 w8", **options)
    assert llm.chat([{"role": "user", "content": "w4 w8"}], **options).text == llm.generate("w4 w8", **options).text
    assert len(llm.chat([[{"role": "user", "content": "w4"}]] * 2, **options)) == 2
    assert len(llm.generate("w4", logprobs=2, **options).logprobs["top_logprobs"]) == 6
    assert llm.generate([], **options) == []


def test_mistakes_are_the_servers(llm: LLM, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="temperature must lie in"):
        llm.generate(["w2", "w3"], temperature=-1)
    with pytest.raises(ValueError, match="this server's context is 64 tokens"):
        llm.generate([[2] * 64])
    with pytest.raises(ValueError, match="n is not taken here"):
        llm.generate("w2", n=2)
    with pytest.raises(ValueError, match="max_slots"):
        LLM(str(checkpoint), max_slots=0)


def test_a_name_that_is_not_offered_is_no_attribute() -> None:
    import spear_jax

    with pytest.raises(AttributeError, match="has no attribute 'LLN'"):
        _ = spear_jax.LLN  # type: ignore[attr-defined]


def line(name: str, *, url: str = "/v1/completions", **body: Any) -> bytes:
    body = {"model": "tiny", "prompt": "w3 w4", "max_tokens": 4, "temperature": 0} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}).encode()


LINES = [
    line("a"),
    line("chat", url="/v1/chat/completions", messages=[{"role": "user", "content": "w5"}]),
    b"",
    b"{",
    b"[" * 100_000,
    b"\xff\xfe",
    b"[1]",
    b'{"custom_id": 7}',
    line("get").replace(b"POST", b"GET"),
    line("path", url="/metrics"),
    line("hot", temperature=9),
    line("a"),
    line("stream", stream=True),
    line("other", model="gpt-9"),
    line("two", n=2, seed=1, temperature=1),
    b'{"custom_id": "bare", "method": "POST", "url": "/v1/completions", "body": []}',
    *(line(f"more{i}", prompt=f"w{i + 2}") for i in range(12)),
]
CODES = {
    4: "invalid_json",
    5: "invalid_json",
    6: "invalid_json",
    7: "invalid_request",
    8: "missing_required_parameter",
    9: "invalid_method",
    10: "invalid_url",
    12: "duplicate_custom_id",
    13: "invalid_request",
    16: "invalid_request",
}


def run(llm: LLM, requests: Path, output: Path) -> list[dict[str, Any]]:
    results = Results(output)
    llm._run(answer_all(llm._local, requests, results, Progress(disable=True)))
    results.close()
    return [json.loads(text) for text in output.read_bytes().splitlines()]


def test_a_batch_has_a_record_for_every_line(llm: LLM, tmp_path: Path) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_bytes(b"\n".join(LINES))
    records = run(llm, requests, output)
    assert len(records) == len(LINES) - 1
    assert len({record["id"] for record in records}) == len(records)
    errors = {r["error"]["line"]: r["error"]["code"] for r in records if r["error"] is not None}
    assert errors == CODES
    statuses = {r["custom_id"]: r["response"]["status_code"] for r in records if r["response"] is not None}
    assert statuses == {"a": 200, "chat": 200, "hot": 400, "other": 404, "two": 200} | {
        f"more{i}": 200 for i in range(12)
    }
    bodies = {r["custom_id"]: r["response"]["body"] for r in records if r["response"] is not None}
    assert bodies["hot"]["error"]["param"] == "temperature"
    assert len(bodies["two"]["choices"]) == 2
    assert bodies["a"]["choices"][0]["text"] == llm.generate("w3 w4", max_tokens=4, temperature=0).text
    before = output.read_bytes()
    assert run(llm, requests, output) == records
    assert output.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 40, 3000])
def test_a_batch_goes_on_after_a_kill(llm: LLM, tmp_path: Path, cut: int) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_bytes(b"\n".join(LINES) + b"\n")
    whole = {r["custom_id"]: r["response"] for r in run(llm, requests, output) if r["error"] is None}
    output.write_bytes(output.read_bytes()[:-cut])
    kept = output.read_bytes().rpartition(b"\n")[0]
    records = run(llm, requests, output)
    assert output.read_bytes().startswith(kept)
    again = {r["custom_id"]: r["response"] for r in records if r["error"] is None}
    assert again.keys() == whole.keys()
    assert len(records) == len(LINES) - 1
    for name in whole:
        assert again[name]["body"].get("choices") == whole[name]["body"].get("choices")


def test_a_file_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"precious": 1}\n')
    with pytest.raises(ValueError, match="no answer of a batch"):
        Results(output)
    assert output.read_text() == '{"precious": 1}\n'


def test_a_checkpoint_is_read_again_between_two_steps_if_it_is_one_of_the_same_kind(
    llm: LLM, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    gateway = llm._local.gateway
    assert gateway.metrics is not None
    reload = Reloader(llm._local.config, gateway)

    def reloaded() -> tuple[str, float | None, float | None]:
        """Read again while answers are being made, and give what is said then and how often it was taken or not."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(llm.generate, ["w3"] * 8, **options)
            reload()
            assert reload._thread is not None
            reload._thread.join()
            assert [answer.completion_tokens for answer in running.result()] == [20] * 8
        value = gateway.metrics.registry.get_sample_value  # type: ignore[union-attr]
        counts = (
            value("spear:checkpoint_reloads_total", {"model_name": "tiny", "taken": t}) for t in ("true", "false")
        )
        return llm.generate("w3 w4", **options).text, *counts

    first = llm.generate("w3 w4", **options).text
    assert reloaded() == (first, 1, 0)
    write(checkpoint, seed=1)
    second, *counts = reloaded()
    assert (second != first, counts) == (True, [2, 0])
    write(checkpoint, seed=1, words=95)
    assert reloaded() == (second, 2, 1)
    assert "its tokenizer is another one" in caplog.text
    shutil.rmtree(checkpoint)
    assert reloaded() == (second, 2, 2)
    write(checkpoint, seed=0)
    assert reloaded() == (first, 3, 2)
    compiled = gateway.metrics.registry.get_sample_value
    assert compiled("spear:compilations_after_ready_total", {"model_name": "tiny"}) == 0


@pytest.mark.slow
def test_sighup_reads_the_checkpoint_again(checkpoint: Path, launch_server: Any) -> None:
    server = launch_server("--model", str(checkpoint), "--max-context", "64", "--reload-checkpoint")
    server.wait_for_log("ready: ", seconds=240)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("reloaded in", seconds=120)
    assert server.metric("compilations_after_ready_total") == 0
    assert server.status("/ready") == 200


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_is_killed_and_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_bytes(b"".join(line(f"r{i}", prompt=f"w{2 + i % 90}", max_tokens=50) + b"\n" for i in range(400)))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "spear_jax.serve", "batch", str(requests), str(output), "--model", str(checkpoint)]
    command += ["--max-context", "64", "--prefill-buckets", "8"]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed = output.read_bytes()
    assert killed.count(b"\n") < 400
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(text) for text in output.read_bytes().splitlines()]
    assert sorted(record["custom_id"] for record in records) == sorted(f"r{i}" for i in range(400))
    assert output.read_bytes().startswith(killed.rpartition(b"\n")[0])
