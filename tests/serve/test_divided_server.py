"""A server whose model is divided over fake devices answers as one on a single device."""

import json
import urllib.request

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_devices_serve_what_one_does(launch_server, monkeypatch: pytest.MonkeyPatch):
    """The demo model has nine heads."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    flags = ("--max-context", "128", "--prefill-buckets", "32", "--max-slots", "2", "--compilation-cache", "none")
    answers = []
    for devices in (1, 3):
        server = launch_server(*flags, "--tensor-parallel", str(devices))
        server.wait_for_log("ready: ", seconds=400)
        request = {"model": "demo", "prompt": "The sea is", "max_tokens": 24, "temperature": 0}
        body = json.dumps(request).encode()
        asked = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as response:
            answers.append(json.load(response)["choices"][0]["text"])
        assert server.metric("compilations_after_ready_total") == 0
    assert answers[0] == answers[1]
    assert len(answers[0]) > 20
    assert "divided over 3 devices" in "".join(server.log)


@pytest.mark.slow
def test_a_model_that_cannot_be_divided_is_refused(launch_server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    server = launch_server("--tensor-parallel", "2", "--quantize", "none")
    assert "tp 2 does not divide num_heads 9" in server.wait_for_log("error: ", seconds=120)
