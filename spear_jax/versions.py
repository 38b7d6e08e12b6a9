"""Which versions a result depends on."""

import importlib.metadata
import platform


def package_versions(*names: str) -> dict[str, str]:
    """Give the version of Python and of each distribution in `names`: "not installed" where it runs from source."""
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
