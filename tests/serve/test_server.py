"""The server as its users meet it: a process, HTTP, and OpenAI's own client."""

import concurrent.futures
import http.client
import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openai
import pytest

from serve.bench import BenchConfig, bench
from spear_jax.evaluation import load_examples
from spear_jax.evaluation.tasks import encode_pairs, score_pairs
from spear_jax.recovery import load_recovered

pytestmark = pytest.mark.timeout(900)

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "Why is the sky blue?",
    "Translate 'good morning' into French.",
    "Count from one to ten.",
    "Tell me a short joke.",
    "Which animal barks?",
]
LONG = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def ask(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    options = {"max_tokens": 24, "temperature": 0} | options
    return client.chat.completions.create(model="demo", messages=messages, **options)


def ask_streaming(client: openai.OpenAI, prompt: str, **options: Any) -> tuple[str, str | None, Any]:
    text, reason, usage = "", None, None
    for chunk in ask(client, prompt, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


def post(server: Any, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def test_health_is_503_until_ready(starting_server: Any) -> None:
    if any("ready:" in line for line in starting_server.log):
        pytest.skip("the server was ready before this test looked")
    assert starting_server.status("/health") == 503
    status, body, headers = post(starting_server, "/v1/completions", b'{"model": "demo", "prompt": "x"}')
    assert (status, body["error"]["code"]) == (503, "not_ready")
    assert headers["retry-after"]


def test_models_and_health(client: openai.OpenAI, server: Any) -> None:
    assert server.status("/health") == 200
    names = [model.id for model in client.models.list()]
    assert names == ["SmolLM2-135M-Instruct", "demo"]
    assert client.models.retrieve("demo").id == "demo"
    assert server.wait_for_log("int4 weights as stored with error compensators of 1.1 MiB", seconds=1)


def test_an_answer_is_right_and_streams_the_same(client: openai.OpenAI) -> None:
    whole = ask(client, PROMPTS[0])
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    text, reason, usage = ask_streaming(client, PROMPTS[0])
    assert (text, reason) == (whole.choices[0].message.content, "stop")
    assert usage == whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_eight_clients_at_once_get_the_answers_they_get_alone(client: openai.OpenAI, server: Any) -> None:
    alone = [ask(client, prompt).choices[0].message.content for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        streamed = list(pool.map(lambda prompt: ask_streaming(client, prompt)[0], PROMPTS))
        whole = list(pool.map(lambda prompt: ask(client, prompt).choices[0].message.content, PROMPTS))
    assert streamed == whole == alone
    assert server.metric("compilations_after_ready_total") == 0


def test_a_seed_gives_the_same_answer_alone_and_in_company(client: openai.OpenAI) -> None:
    options = {"temperature": 1.0, "seed": 7, "top_p": 0.9, "max_tokens": 16}
    alone = ask(client, PROMPTS[1], **options).choices[0].message.content
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        others = [pool.submit(ask, client, prompt, temperature=1.5, max_tokens=30) for prompt in PROMPTS[:3]]
        assert ask(client, PROMPTS[1], **options).choices[0].message.content == alone
        concurrent.futures.wait(others)
    assert ask(client, PROMPTS[1], **(options | {"seed": 8})).choices[0].message.content != alone


def test_a_beginning_that_was_there_before_is_not_computed_again(client: openai.OpenAI, server: Any) -> None:
    assert "KV cache of 48 pages, 3072 tokens" in server.wait_for_log("KV cache of", seconds=1)
    hits, ids = server.metric("prefix_cache_hits_total"), list(range(2000, 2150))
    options: dict[str, Any] = {"model": "demo", "max_tokens": 5, "temperature": 0}
    first, again, two = (
        client.completions.create(prompt=ids, **options | more) for more in ({}, {}, {"n": 2, "temperature": 0.5})
    )
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, again, two)]  # type: ignore[union-attr]
    assert cached == [0, 128, 128]
    assert again.choices[0].text == first.choices[0].text
    assert server.metric("prefix_cache_hits_total") - hits == 3 * 128
    assert server.metric("prefix_cache_queries_total") >= hits + 4 * 150
    assert server.metric("num_preemptions_total") == 0


def test_text_completions_take_lists_and_token_ids_and_n(client: openai.OpenAI) -> None:
    both = client.completions.create(
        model="demo", prompt=["One, two, three,", "Red, green,"], max_tokens=5, temperature=0
    )
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text.startswith(" four")
    assert both.choices[0].finish_reason == "length"
    assert both.usage is not None
    assert both.usage.completion_tokens == 10
    by_ids = client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=3)
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3
    two = ask(client, PROMPTS[6], n=2, temperature=1.0, seed=1)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].message.content != two.choices[1].message.content
    streamed = client.completions.create(
        model="demo", prompt="One, two, three,", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == both.choices[0].text


def test_stop_strings_end_the_answer_and_do_not_show(client: openai.OpenAI) -> None:
    full = ask(client, PROMPTS[0]).choices[0].message.content
    for stream in (False, True):
        options = {"stop": ["is Par"]}
        if stream:
            text, reason, _ = ask_streaming(client, PROMPTS[0], **options)
        else:
            choice = ask(client, PROMPTS[0], **options).choices[0]
            text, reason = choice.message.content, choice.finish_reason
        assert (text, reason) == (full.partition("is Par")[0], "stop")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 4}, {"stop": ["is Par"]}])
def test_log_probabilities_of_chat_answers(client: openai.OpenAI, server: Any, options: dict[str, Any]) -> None:
    options = {"logprobs": True, "top_logprobs": 20, "max_tokens": 12} | options
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        beside = pool.submit(ask, client, PROMPTS[1], max_tokens=30)
        choice = ask(client, PROMPTS[0], **options).choices[0]
        beside.result()
    content = choice.logprobs.content
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len({bytes(top.bytes) for top in entry.top_logprobs}) == len(values) == 20
        assert values == sorted(values, reverse=True)
        assert 0.2 < sum(map(math.exp, values)) <= 1 + 1e-4
        chosen = [top.logprob for top in entry.top_logprobs if top.token == entry.token]
        assert chosen == [pytest.approx(entry.logprob, abs=1e-4)] or entry.logprob <= values[-1] + 1e-4
        if "temperature" not in options:
            assert entry.logprob == pytest.approx(values[0], abs=1e-4)
    text = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert text == choice.message.content + ("is" if "stop" in options else "")
    chunks = [c.choices[0] for c in ask(client, PROMPTS[0], stream=True, **options)]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    np.testing.assert_allclose([e.logprob for e in streamed], [e.logprob for e in content], atol=1e-3)
    assert all(chunk.logprobs is not None for chunk in chunks if chunk.delta.content)
    assert ask(client, PROMPTS[0], max_tokens=1).choices[0].logprobs is None
    assert ask(client, PROMPTS[0], max_tokens=1, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert server.metric("compilations_after_ready_total") == 0


def test_log_probabilities_of_completions(client: openai.OpenAI) -> None:
    def complete(**options: Any) -> Any:
        prompts: Any = ["One, two, three,", "Say hello in Chinese: 你"]
        return client.completions.create(model="demo", prompt=prompts, max_tokens=7, temperature=0, **options)

    whole, streamed = complete(logprobs=3).choices, complete(logprobs=3, stream=True)
    pieces: list[dict[str, list[Any]]] = [{}, {}]
    for chunk in streamed:
        for name, values in chunk.choices[0].logprobs.model_dump().items():
            pieces[chunk.choices[0].index].setdefault(name, []).extend(values)
    for choice, piece in zip(whole, pieces, strict=True):
        told = choice.logprobs
        assert (told.tokens, told.text_offset) == (piece["tokens"], piece["text_offset"])
        np.testing.assert_allclose(told.token_logprobs, piece["token_logprobs"], atol=1e-3)
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) <= 7
        for token, logprob, top, offset in zip(
            told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
        ):
            assert len(top) == 3
            assert top[token] == pytest.approx(logprob) == pytest.approx(max(top.values()), abs=1e-4)
            assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
    assert "".join(whole[0].logprobs.tokens) == whole[0].text
    assert [len(top) for top in complete(logprobs=0).choices[0].logprobs.top_logprobs] == [1] * 7


def test_echo_tells_of_the_prompt_as_evaluation_clients_ask(client: openai.OpenAI, server: Any) -> None:
    """What lm-eval's `local-completions` sends and reads: lists of token ids, `echo`, one token more."""
    prompts = [[504, 3575, 282, 4649, 314, 7042, 30], [9] * 70, [28]]
    options: Any = {"model": "demo", "temperature": 0, "logprobs": 1, "seed": 1234, "echo": True}
    one = client.completions.create(prompt=prompts, max_tokens=1, **options)
    none = client.completions.create(prompt=prompts, max_tokens=0, **options)
    assert (one.usage.completion_tokens, none.usage.completion_tokens) == (3, 0)  # type: ignore[union-attr]
    for prompt, whole, short in zip(prompts, one.choices, none.choices, strict=True):
        told: Any = whole.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + 1
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
        assert short.logprobs.token_logprobs == pytest.approx(told.token_logprobs[:-1], nan_ok=True)  # type: ignore
        assert whole.text.startswith(short.text)
        for token, value, top, offset in [*zip(*(getattr(told, n) for n in (
            "tokens", "token_logprobs", "top_logprobs", "text_offset")), strict=True)][1:]:  # fmt: skip
            assert top[token] == value <= max(top.values())
            assert whole.text[offset:].startswith(token)
    text = "The capital of France is Paris. 你好"
    echoed = client.completions.create(prompt=text, max_tokens=3, **options | {"logprobs": None}).choices[0]
    assert echoed.text.startswith(text + " " if echoed.text[len(text)] == " " else text)
    assert echoed.logprobs is None
    streamed = list(client.completions.create(prompt=text, max_tokens=3, stream=True, n=2, **options))
    for index in range(2):
        pieces = [chunk.choices[0] for chunk in streamed if chunk.choices[0].index == index]
        assert "".join(piece.text for piece in pieces) == echoed.text
        names: list[str] = [name for piece in pieces if piece.logprobs for name in piece.logprobs.tokens or []]
        assert "".join(names[:7]) == "The capital of France is Paris."
    assert server.metric("compilations_after_ready_total") == 0


def test_echoed_log_probabilities_are_those_of_the_model_that_is_served(client: openai.OpenAI) -> None:
    lambada = Path(__file__).parents[3] / "shared" / "data" / "tasks" / "lambada_test.jsonl"
    if not lambada.is_file():
        pytest.skip(f"no {lambada}")
    loaded = load_recovered(dtype="float32")
    pairs = [example.choices[0] for example in load_examples("lambada", tasks_dir=lambada.parent, limit=6)]
    encoded = encode_pairs(loaded.tokenizer, pairs)
    expected = score_pairs(loaded.model, encoded, max_length=384)
    answers: Any = client.completions.create(
        model="demo", prompt=[ids for ids, _ in encoded], echo=True, max_tokens=1, logprobs=1, temperature=0
    ).choices
    for (ids, length), answer, total, greedy in zip(encoded, answers, *expected, strict=True):
        values = answer.logprobs.token_logprobs[len(ids) - length : -1]
        tops = answer.logprobs.top_logprobs[len(ids) - length : -1]
        assert sum(values) == pytest.approx(total, abs=2e-3)
        assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True)) == greedy


def test_tokens_and_texts_go_both_ways(client: openai.OpenAI, server: Any) -> None:
    def ask_for(path: str, **body: Any) -> Any:
        status, answer, _ = post(server, path, json.dumps(body).encode())
        assert status == 200, answer
        return answer

    text = "Three colours: red 你好"
    told = ask_for("/tokenize", model="demo", prompt=text, return_token_strs=True)
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 384)
    assert "".join(told["token_strs"][:4]) == "Three colours: red"
    assert ask_for("/detokenize", tokens=told["tokens"]) == {"prompt": text}
    assert ask_for("/tokenize", prompt=text)["token_strs"] is None
    messages = HELLO["messages"]
    laid_out = ask_for("/tokenize", messages=messages)
    usage = client.chat.completions.create(model="demo", messages=messages, max_tokens=1).usage
    assert usage is not None
    assert laid_out["count"] == usage.prompt_tokens
    assert ask_for("/detokenize", tokens=laid_out["tokens"])["prompt"].endswith("<|im_start|>assistant\n")
    assert ask_for("/tokenize", messages=messages, add_generation_prompt=False)["count"] < laid_out["count"]


def test_stop_tokens_end_an_answer(client: openai.OpenAI, server: Any) -> None:
    (comma,) = post(server, "/tokenize", b'{"prompt": ","}')[1]["tokens"]
    answer = client.completions.create(
        model="demo", prompt="One, two, three,", max_tokens=6, temperature=0, extra_body={"stop_token_ids": [comma]}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" four", "stop")


def test_the_end_of_the_context_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt=[9] * 380, max_tokens=100, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 384


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


JSON = {"type": "json_object"}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (CHAT, b"{", 400, None, "invalid_json"),
        (CHAT, b"\xff\xfe", 400, None, None),
        (CHAT, b"[" * 100_000, 400, None, None),
        (CHAT, b"[]", 400, None, "invalid_type"),
        (CHAT, {"model": "demo"}, 400, "messages", "missing_required_parameter"),
        (CHAT, HELLO | {"messages": []}, 400, "messages", None),
        (CHAT, HELLO | {"messages": "hi"}, 400, "messages", "invalid_type"),
        (CHAT, HELLO | {"temperature": "hot"}, 400, "temperature", "invalid_type"),
        (CHAT, json.dumps(HELLO | {"temperature": float("nan")}).encode(), 400, "temperature", None),
        (CHAT, HELLO | {"temperature": -1}, 400, "temperature", "invalid_value"),
        (CHAT, HELLO | {"top_p": 0}, 400, "top_p", "invalid_value"),
        (CHAT, HELLO | {"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        (CHAT, HELLO | {"max_tokens": True}, 400, "max_tokens", "invalid_type"),
        (CHAT, HELLO | {"n": 0}, 400, "n", "invalid_value"),
        (CHAT, HELLO | {"stop": ["a", ""]}, 400, "stop", "invalid_value"),
        (CHAT, HELLO | {"seed": 2**70}, 400, "seed", "invalid_value"),
        (CHAT, HELLO | {"tools": [{"type": "function"}]}, 400, "tools", "missing_required_parameter"),
        (CHAT, HELLO | {"tools": [tool("get weather")]}, 400, "tools", "invalid_type"),
        (CHAT, HELLO | {"tools": [tool("f"), tool("f")]}, 400, "tools", "invalid_value"),
        (CHAT, HELLO | {"tools": [tool("f", type="what")], "tool_choice": "required"}, 400, "tools", "invalid_value"),
        (CHAT, HELLO | {"tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
        (CHAT, HELLO | {"tools": [tool("f")], "tool_choice": named("g")}, 400, "tool_choice", "invalid_value"),
        (CHAT, HELLO | {"tools": [tool("f")], "response_format": JSON}, 400, "response_format", "invalid_value"),
        (CHAT, HELLO | {"response_format": {"type": "yaml"}}, 400, "response_format", "invalid_type"),
        (CHAT, HELLO | {"response_format": {"type": "json_schema"}}, 400, "response_format", "invalid_value"),
        (CHAT, HELLO | {"response_format": schema({"type": 3})}, 400, "response_format", "invalid_value"),
        (CHAT, HELLO | {"response_format": schema({"enum": ["x" * 70_000]})}, 400, "response_format", "invalid_value"),
        (CHAT, HELLO | {"response_format": schema({"pattern": "("})}, 400, "response_format", "invalid_value"),
        (CHAT, HELLO | {"response_format": schema({"$ref": "http://x.y/z"})}, 400, "response_format", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": "x", "structured_outputs": {}}, 400, "structured_outputs", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": "x", "structured_outputs": {"regex": "("}}, 400, "structured_outputs", None),
        (
            TEXT,
            {"model": "demo", "prompt": "x", "structured_outputs": {"regex": "(a*)*" * 500}},
            400,
            "structured_outputs",
            "invalid_value",
        ),
        (
            TEXT,
            {"model": "demo", "prompt": "x", "structured_outputs": {"grammar": "start: " + "(" * 9000}},
            400,
            "structured_outputs",
            "invalid_value",
        ),
        (TEXT, {"model": "demo", "prompt": "x", "tools": [1]}, 400, "tools", "unsupported_parameter"),
        (CHAT, HELLO | {"logprobs": 3}, 400, "logprobs", "invalid_type"),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": -1}, 400, "top_logprobs", "invalid_value"),
        (CHAT, HELLO | {"logprobs": True, "top_logprobs": 1.5}, 400, "top_logprobs", "invalid_type"),
        (CHAT, HELLO | {"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": "x", "logprobs": 6}, 400, "logprobs", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": "x", "logprobs": -1}, 400, "logprobs", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": "x", "logprobs": True}, 400, "logprobs", "invalid_type"),
        (CHAT, HELLO | {"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        (CHAT, HELLO | {"presence_penalty": 3}, 400, "presence_penalty", "invalid_value"),
        (CHAT, HELLO | {"repetition_penalty": 0}, 400, "repetition_penalty", "invalid_value"),
        (CHAT, HELLO | {"logit_bias": {"999999": 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT, HELLO | {"logit_bias": {"one": 1}}, 400, "logit_bias", "invalid_value"),
        (CHAT, HELLO | {"logit_bias": {"1": 101}}, 400, "logit_bias", "invalid_value"),
        (CHAT, HELLO | {"x-slo-ttft-ms": 0}, 400, "x-slo-ttft-ms", "invalid_value"),
        (CHAT, HELLO | {"slo_tpot_ms": "fast"}, 400, None, "invalid_type"),
        (CHAT, HELLO | {"priority": 0.5}, 400, "priority", "invalid_type"),
        (CHAT, HELLO | {"priority": 10**400}, 400, "priority", None),
        (CHAT, HELLO | {"model": "gpt-9"}, 404, "model", "model_not_found"),
        (CHAT, b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages", None),
        (TEXT, {"model": "demo", "prompt": []}, 400, "prompt", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": [10**9]}, 400, "prompt", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": [-1]}, 400, "prompt", "invalid_type"),
        (TEXT, {"model": "demo", "prompt": [9] * 384}, 400, "prompt", "context_length_exceeded"),
        (TEXT, {"model": "demo", "prompt": "word " * 500}, 400, "prompt", "context_length_exceeded"),
        (TEXT, {"model": "demo", "prompt": "x", "best_of": 3}, 400, "best_of", "unsupported_parameter"),
        (TEXT, {"model": "demo", "prompt": "x", "suffix": "y"}, 400, "suffix", "unsupported_parameter"),
        (TEXT, {"model": "demo", "prompt": "x", "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": "x", "echo": 1}, 400, "echo", "invalid_type"),
        (CHAT, HELLO | {"echo": True}, 400, "echo", "unsupported_parameter"),
        (CHAT, HELLO | {"compensators": False}, 400, "compensators", "invalid_value"),
        (CHAT, HELLO | {"messages": [{"content": "hi"}]}, 400, "messages", "missing_required_parameter"),
        (CHAT, HELLO | {"messages": [{"role": "user", "content": 42}]}, 400, "messages", "invalid_type"),
        (CHAT, HELLO | {"messages": [{"role": 3, "content": "hi"}]}, 400, "messages", "invalid_type"),
        (CHAT, HELLO | {"messages": None}, 400, "messages", "invalid_type"),
        ("/tokenize", {"model": "gpt-9", "prompt": "x"}, 404, "model", "model_not_found"),
        ("/tokenize", {"prompt": "x", "messages": HELLO["messages"]}, 400, "prompt", "invalid_value"),
        ("/detokenize", {"tokens": [10**9]}, 400, "tokens", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": ["x"] * 13}, 400, "n", "invalid_value"),
        (TEXT, {"model": "demo", "prompt": "x" * 300_000}, 413, None, "body_too_large"),
        ("/v1/nothing", {}, 404, None, "unknown_url"),
        ("/health", {}, 405, None, None),
    ],
)
def test_mistakes_have_openai_shape(
    server: Any, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, answer, _ = post(server, path, data)
    assert got == status, answer
    assert answer.keys() == {"error"}
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    if param is not None:
        assert answer["error"]["param"] == param
    if code is not None:
        assert answer["error"]["code"] == code


def test_unknown_fields_and_harmless_values_pass(server: Any) -> None:
    body = HELLO | {"store": False, "metadata": {"a": "b"}, "tools": None, "frequency_penalty": 0, "logit_bias": {}}
    assert post(server, CHAT, json.dumps(body).encode())[0] == 200


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 10, "maximum": 99},
                   "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "age", "kind"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_answers_fit_the_schema_beside_free_ones(client: openai.OpenAI, server: Any, temperature: float) -> None:
    free = ask(client, PROMPTS[1], max_tokens=20).choices[0].message.content
    options = {"response_format": schema(PERSON), "max_tokens": 80, "temperature": temperature, "seed": 5}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(ask, client, PROMPTS[1], max_tokens=20) for _ in range(2)]
        streamed = pool.submit(ask_streaming, client, "Tell me of a pet.", **options)
        whole = ask(client, "Tell me of a pet.", n=2, **options)
        assert {one.result().choices[0].message.content for one in beside} == {free}
    first, second = (json.loads(choice.message.content) for choice in whole.choices)
    for told in (first, second):
        assert told.keys() == {"name", "age", "kind"}
        assert 10 <= told["age"] <= 99
        assert told["kind"] in ("cat", "dog")
    assert (json.loads(streamed.result()[0]), streamed.result()[1]) == (first, "stop")
    assert (first != second) == (temperature > 0)
    assert server.metric("compilations_after_ready_total") == 0


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["rouge", 'vert "clair"']}, 'rouge|vert "clair"'),
        ({"grammar": 'start: "<" /[a-z]{2,3}/ ">"'}, "<[a-z]{2,3}>"),
        ({"json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}}, r"\[.*\]"),
    ],
)
def test_structured_outputs_of_completions(client: openai.OpenAI, asked: dict[str, Any], pattern: str) -> None:
    answer = client.completions.create(
        model="demo", prompt="It is ", max_tokens=40, temperature=1.0, extra_body={"structured_outputs": asked}
    )
    assert re.fullmatch(pattern, answer.choices[0].text, re.DOTALL), answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


WEATHER = tool(
    "get_weather", type="object", properties={"city": {"$ref": "#/$defs/city"}}, required=["city"],
    additionalProperties=False, **{"$defs": {"city": {"enum": ["Paris", "Rome"]}}},
)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", named("get_weather")])
def test_demanded_calls_are_calls_with_arguments_that_fit(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    tools = [WEATHER] if choice == "required" else [tool("noop"), WEATHER]
    options: dict[str, Any] = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 60}
    answer = ask(client, "How is the weather in Rome?", stream=stream, **options)
    if stream:
        pieces = [chunk.choices[0] for chunk in answer]
        calls = [call for piece in pieces for call in piece.delta.tool_calls or ()]
        text, reason = "".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason
        assert [call.index for call in calls] == [0]
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        calls, text = message.tool_calls, message.content or ""
    (call,) = calls
    assert (call.type, call.function.name, text) == ("function", "get_weather", "")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert reason == ("tool_calls" if choice == "required" else "stop")
    assert call.id.startswith("call_")


def test_a_conversation_goes_on_after_a_call(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages: Any = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "sunny"}'},
    ]
    answer = client.chat.completions.create(
        model="demo",
        messages=messages,
        tools=[WEATHER],
        max_tokens=24,
        temperature=0,  # type: ignore[list-item]
    )
    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match="get_weather are no JSON"):
        client.chat.completions.create(model="demo", messages=messages, max_tokens=1)


def test_a_bias_and_a_penalty_change_the_answer(client: openai.OpenAI) -> None:
    def complete(**options: Any) -> str:
        made = client.completions.create(model="demo", prompt=[9] * 8, max_tokens=12, temperature=0, **options)
        return made.choices[0].text

    assert complete(logit_bias={"42": 100}) == complete(logit_bias={"42": 100}, seed=3) != complete()
    assert len(set(complete(logit_bias={"42": 100}))) <= 2
    assert complete(frequency_penalty=2.0, presence_penalty=2.0) != complete()


def test_limits_come_as_headers_or_in_the_body(server: Any) -> None:
    before = server.metric("request_slo_total")
    slow = {"x-slo-ttft-ms": "600000", "x-llm-d-slo-tpot-ms": "600000"}
    assert post(server, CHAT, json.dumps(HELLO).encode(), slow)[0] == 200
    assert post(server, CHAT, json.dumps(HELLO | {"slo_ttft_ms": 1e6, "priority": -1}).encode())[0] == 200
    assert post(server, CHAT, json.dumps(HELLO).encode())[0] == 200
    assert server.metric("request_slo_total") == before + 2
    status, body, _ = post(server, CHAT, json.dumps(HELLO).encode(), {"x-slo-tpot-ms": "soon"})
    assert (status, body["error"]["param"]) == (400, "x-slo-tpot-ms")


def test_the_sdk_raises_the_right_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="demo", prompt="word " * 500)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server: Any, stream: bool) -> None:
    server.wait_for_metric("num_requests_running", lambda n: n == 0)
    before = server.metric("generation_tokens_total")
    body = json.dumps(HELLO | LONG | {"stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        server.wait_for_metric("num_requests_running", lambda n: n == 1)
        server.wait_for_metric("generation_tokens_total", lambda n: n > before)
    server.wait_for_metric("num_requests_running", lambda n: n == 0)
    assert server.metric("generation_tokens_total") - before < 290, "it ended by itself, which shows nothing"


def test_the_bench_measures_a_server_at_its_rate(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench(
        BenchConfig(
            url=server.url, load="fixed", rates=(20.0,), requests=5, prompt_tokens=20, tokens=6, ttft_slo_ms=1e6
        )
    )
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["requests"], result["refused"], result["attained"]) == (5, 0, 1.0)
    assert result["output_tokens_per_second"] == pytest.approx(30 / result["seconds"])
    assert result["seconds"] > 0.2
    assert result["ttft_ms"]["p50"] > 0


def test_a_full_queue_says_when_to_come_back(server: Any) -> None:
    def one(_: int) -> tuple[int, Any, Any]:
        return post(server, CHAT, json.dumps(HELLO | LONG | {"max_tokens": 60}).encode())

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    assert sorted(status for status, _, _ in answers) == [200] * 12 + [503] * 4
    refused = next(answer for answer in answers if answer[0] == 503)
    assert refused[1]["error"]["code"] == "queue_full"
    assert int(refused[2]["retry-after"]) >= 1
    server.wait_for_metric("num_requests_running", lambda n: n == 0)
    assert post(server, CHAT, json.dumps(HELLO).encode())[0] == 200


def test_a_port_in_use_is_one_line_and_status_2(starting_server: Any) -> None:
    port = starting_server.url.rsplit(":", 1)[1]
    assert_mistake(["--port", port], "choose another --port")


def assert_mistake(flags: list[str], word: str, *, module: str = "spear_jax.serve") -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    assert word in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["missing.yaml"], "missing.yaml"),
        (["--port", "0", "--model", "missing.gguf"], "missing.gguf"),
        (["--max-slots", "0"], "max_slots"),
        (["--slots", "3"], "--slots"),
        (["--scheduler.itl-slo-ms", "-1"], "scheduler.itl_slo_ms"),
        (["--port", "0", "--scheduler.latency-table", "none", "--scheduler.itl-slo-ms", "20"], "need a latency table"),
        (["--port", "0", "--max-context", "9000"], "max_context 9000 is more than the 8192 positions of the model"),
    ],
)
def test_mistakes_in_settings_are_one_line_and_status_2(flags: list[str], word: str) -> None:
    assert_mistake(flags, word)


@pytest.mark.parametrize("module", ["spear_jax.serve", "spear_jax.evaluate"])
@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("truncated", "model.gguf: truncated"),
        ("type", "tensor blk.0.attn_q.weight has type Q2_K, which is not supported"),
        ("architecture", "architecture FalconForCausalLM"),
        ("empty", "config.json"),
    ],
)
def test_models_that_cannot_be_read_are_one_line_and_status_2(
    tmp_path: Path, module: str, kind: str, word: str
) -> None:
    model = tmp_path / "model.gguf"
    if kind in ("truncated", "type"):
        writer = gguf.GGUFWriter(model, "llama")
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((1, 84), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q2_K)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    if kind == "truncated":
        model.write_bytes(model.read_bytes()[:90])
    if kind in ("architecture", "empty"):
        model.mkdir()
    if kind == "architecture":
        (model / "config.json").write_text('{"architectures": ["FalconForCausalLM"], "model_type": "falcon"}')
    flags = ["--port", "0"] if module == "spear_jax.serve" else ["--text", __file__]
    assert_mistake(["--model", str(model), *flags], word, module=module)


def test_an_unknown_key_in_the_yaml_is_named(tmp_path: Path) -> None:
    settings = tmp_path / "x.yaml"
    settings.write_text("max_slotz: 3\n")
    assert_mistake([str(settings)], "max_slotz")


def test_sigterm_lets_answers_finish_and_takes_no_more(server: Any) -> None:
    """Runs last: it ends the shared server."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        body = json.dumps(HELLO | LONG | {"max_tokens": 80}).encode()
        running = [pool.submit(post, server, CHAT, body) for _ in range(2)]
        server.wait_for_metric("num_requests_running", lambda n: n == 2)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining", seconds=30)
        status, answer, headers = post(server, CHAT, json.dumps(HELLO).encode())
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert headers["retry-after"]
        assert server.status("/health") == 503
        for done in running:
            status, answer, _ = done.result(timeout=120)
            assert status == 200
            assert answer["usage"]["completion_tokens"] == 80
    assert server.process.wait(60) == 0
    deadline = time.monotonic() + 5
    while "stopped" not in "".join(server.log) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "stopped" in server.log[-1]
    assert "Traceback" not in "".join(server.log)
