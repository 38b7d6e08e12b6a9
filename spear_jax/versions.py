"""Which versions a result depends on."""

import importlib.metadata
import platform


def package_versions(*names: str) -> dict[str, str]:
    """Give the version of Python and of each installed distribution in `names`."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
