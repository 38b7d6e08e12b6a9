"""Clients that people use, against the server: those of `uv sync --group clients`, and OpenAI's for JavaScript."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spear_jax.evaluation import load_examples
from spear_jax.evaluation.tasks import run_task
from spear_jax.recovery import load_recovered

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore")]

LAMBADA = Path(__file__).parents[3] / "shared" / "data" / "tasks" / "lambada_test.jsonl"
HELLO: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_litellm(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="needs `uv sync --group clients`")
    where: Any = {"api_base": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "temperature": 0}
    answer = litellm.completion(model="openai/demo", messages=HELLO, max_tokens=24, **where)
    assert "Paris" in answer.choices[0].message.content
    pieces = litellm.completion(
        model="openai/demo", messages=HELLO, max_tokens=24, stream=True, stream_options={"include_usage": True}, **where
    )
    chunks = list(pieces)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == answer.choices[0].message.content
    assert [c.usage.total_tokens for c in chunks if getattr(c, "usage", None)][-1:] == [answer.usage.total_tokens]
    text = litellm.text_completion(
        model="text-completion-openai/demo", prompt="One, two, three,", max_tokens=4, **where
    )
    assert text.choices[0].text.startswith(" four")
    kinds = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"]}
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": kinds}}
    held = litellm.completion(model="openai/demo", messages=HELLO, max_tokens=40, response_format=form, **where)
    assert json.loads(held.choices[0].message.content)["kind"] in ("cat", "dog")
    with pytest.raises(litellm.exceptions.BadRequestError):
        litellm.completion(model="openai/demo", messages=HELLO, max_tokens=-1, **where)


def test_lm_eval_scores_a_slice_of_lambada_as_we_do(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not LAMBADA.is_file():
        pytest.skip(f"no {LAMBADA}")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    lm_eval = pytest.importorskip("lm_eval", reason="needs `uv sync --group clients`")
    loaded, count = load_recovered(dtype="float32"), 40
    loaded.tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{line}\n" for line in LAMBADA.read_text().splitlines()[:count]))
    task = {
        "task": "lambada_slice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity", "aggregation": "perplexity"}],
    }
    model = {"model": "demo", "base_url": f"{server.url}/v1/completions", "tokenizer": str(tmp_path / "tokenizer")}
    told = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=model | {"batch_size": 4, "max_length": 383, "max_retries": 1},
        tasks=[task],
        bootstrap_iters=0,
    )
    found = told["results"]["lambada_slice"]
    examples = load_examples("lambada", tasks_dir=LAMBADA.parent, limit=count)
    own = run_task(loaded.model, loaded.tokenizer, "lambada", examples, max_length=383).metrics
    assert found["acc,none"] == pytest.approx(own["acc"])
    assert 0.1 < own["acc"] < 0.6
    assert found["perplexity,none"] == pytest.approx(own["perplexity"], rel=1e-4)


def test_schemathesis_finds_no_request_that_makes_the_server_fail(server: Any, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="needs `uv sync --group clients`")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
        "--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--max-examples", "40",
        "--seed", "1", "--exclude-path", "/metrics", "--request-timeout", "120", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, cwd=tmp_path, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "POST /v1/chat/completions" in done.stdout or "operations" in done.stdout.lower(), done.stdout[-3000:]
    assert server.status("/health") == 200
    assert server.metric("compilations_after_ready_total") == 0


JAVASCRIPT = """
import OpenAI from 'openai';
const client = new OpenAI({baseURL: process.argv[2] + '/v1', apiKey: 'none', maxRetries: 0});
const messages = [{role: 'user', content: 'What is the capital of France?'}];
const ask = {model: 'demo', messages, max_tokens: 24, temperature: 0};
const whole = await client.chat.completions.create({...ask, logprobs: true, top_logprobs: 2});
let text = '', usage = null, error = null;
for await (const chunk of await client.chat.completions.create(
    {...ask, stream: true, stream_options: {include_usage: true}})) {
  text += chunk.choices[0]?.delta?.content ?? '';
  usage = chunk.usage ?? usage;
}
const tools = [{type: 'function', function: {name: 'f', parameters: {
  type: 'object', properties: {x: {enum: [1, 2]}}, required: ['x'], additionalProperties: false}}}];
const call = await client.chat.completions.create({...ask, max_tokens: 40, tools, tool_choice: 'required',
  parallel_tool_calls: false});
const runner = client.chat.completions.stream({...ask, max_tokens: 40, tools, tool_choice: 'required',
  parallel_tool_calls: false});
const streamed = await runner.finalChatCompletion();
const models = (await client.models.list()).data.map(model => model.id);
try { await client.completions.create({model: 'gpt-9', prompt: 'x'}); } catch (e) { error = [e.status, e.code]; }
console.log(JSON.stringify({whole: whole.choices[0].message.content, told: whole.choices[0].logprobs.content.length,
  text, usage, models, error, call: call.choices[0].message.tool_calls.map(c => c.function),
  streamed: streamed.choices[0].message.tool_calls.map(c => c.function)}));
"""


def test_openai_for_javascript(server: Any, tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    command = [npm, "install", "--silent", "--ignore-scripts", "openai@7.57.0"]
    installed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"npm cannot install openai: {installed.stderr[-200:]}")
    script = tmp_path / "ask.mjs"
    script.write_text(JAVASCRIPT)
    done = subprocess.run([node, str(script), server.url], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "Paris" in told["whole"]
    assert told["text"] == told["whole"]
    assert told["told"] in (told["usage"]["completion_tokens"], told["usage"]["completion_tokens"] - 1)
    assert told["models"] == ["SmolLM2-135M-Instruct", "demo"]
    assert told["error"] == [404, "model_not_found"]
    for (call,) in (told["call"], told["streamed"]):
        assert call["name"] == "f"
        assert json.loads(call["arguments"])["x"] in (1, 2)
