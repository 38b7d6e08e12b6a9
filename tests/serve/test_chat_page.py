"""The chat page in headless Chromium, driven over its debugging pipe."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Browser:
    """A page in headless Chromium."""

    def __init__(self, program: str, profile: Path):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # Chromium takes commands on descriptor 3 and answers on 4.
        command = (
            f"exec {program} --headless --no-sandbox --disable-gpu --remote-debugging-pipe --window-size=1200,800 "
            f"--user-data-dir={profile} about:blank 8<&{read} 9>&{write} 3<&8 4>&9"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(read, write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self._held, self._calls, self._session = b"", 0, None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> Any:
        """Give the result of a command."""
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                part = os.read(self._read, 1 << 16)
                assert part, "the browser ended"
                self._held += part
            one, _, self._held = self._held.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str) -> Any:
        """Give the value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, *, seconds: float = 120) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.1)

    def type(self, text: str) -> None:
        """Type into the page's question and press Enter."""
        self.value("document.getElementById('input').focus()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    browser = Browser(program, tmp_path / "profile")
    yield browser
    browser.close()


FIGURES = r"^\d+\.\d tokens/s · first token \d+ ms · \d+ tokens"


def test_the_page_streams_answers_with_and_without_compensators_side_by_side(
    browser: Browser, launch_server: Callable[..., Any]
) -> None:
    server = launch_server("--max-context", "384", "--prefill-buckets", "64", "--max-slots", "2", "--compare")
    browser.call("Page.navigate", url=server.url)
    browser.wait("document.getElementById('model')?.textContent.includes('starting')")
    server.wait_for_log("ready: ", seconds=540)
    browser.wait("document.getElementById('model').textContent === 'SmolLM2-135M-Instruct'")
    texts = "[...document.querySelectorAll('.text')].map(e => e.textContent)"
    figures = "[...document.querySelectorAll('.figures')].map(e => e.textContent)"
    busy = "document.getElementById('send').disabled"
    browser.type("What is the capital of France? <b>&amp;")
    browser.wait(f"{texts}.some(text => text.length > 0)")
    assert browser.value(busy)
    browser.wait(f"!{busy}")
    assert all("Paris" in text for text in browser.value(texts))
    assert browser.value("document.querySelector('.user').textContent") == "What is the capital of France? <b>&amp;"
    assert browser.value("[...document.querySelectorAll('h2')].map(e => e.textContent)") == [
        "with compensators",
        "without compensators",
    ]
    assert all(re.search(FIGURES, text) for text in browser.value(figures)), browser.value(figures)
    browser.value("document.getElementById('compare').click()")
    browser.value("document.getElementById('tokens').value = 300")
    browser.type("Tell me a long story about the sea.")
    browser.wait(f"{texts}.length === 3 && {texts}[2].length > 20")
    browser.value("document.getElementById('stop').click()")
    browser.wait(f"!{busy}", seconds=20)
    assert browser.value(f"{figures}[2]").endswith("ended by you")
    server.wait_for_metric("num_requests_running", lambda n: n == 0)
    browser.value("document.getElementById('tokens').value = -1")
    browser.type("Hello")
    browser.wait(f"{texts}.length === 4 && {texts}[3].includes('max_tokens')")
    browser.value("document.getElementById('clear').click()")
    assert browser.value(texts) == []
    assert server.metric("compilations_after_ready_total") == 0
