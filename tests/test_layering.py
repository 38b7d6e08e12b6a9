"""The house's layers: an import never points up, and private parts of jax stay private."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = {"spear_jax/serve.py", "spear_jax/calibrate.py", "pallas_kernels/aot.py"}
ALLOWED = {
    "pallas_kernels": {"pallas_kernels"},
    "spear_jax": {"pallas_kernels", "spear_jax"},
    "calibrate": {"pallas_kernels", "spear_jax", "calibrate"},
    "serve": {"pallas_kernels", "spear_jax", "serve"},
}
SUBLAYERS = ["spear_jax.quant", "spear_jax.nn", "spear_jax.models"]
"""Inside spear_jax, lowest first: none of these imports one after it."""

FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def breaches(relative: str, source: str) -> list[str]:
    package = relative.split("/")[0]
    allowed = set(ALLOWED) if relative in ENTRIES else ALLOWED[package]
    own = relative.removesuffix(".py").replace("/", ".")
    level = next((i for i, layer in enumerate(SUBLAYERS) if own.startswith(layer)), None)
    found = []
    for module in imported_modules(source):
        top = module.split(".")[0]
        above = SUBLAYERS[level + 1 :] if level is not None else []
        points_up = top in ALLOWED and top not in allowed
        if points_up or module.startswith("jax._src") or any(module.startswith(layer) for layer in above):
            found.append(f"{relative} imports {module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_never_point_up(path: Path):
    assert breaches(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("pallas_kernels/a.py", "import spear_jax.config"),
        ("spear_jax/a.py", "from serve.engine import Engine"),
        ("calibrate/a.py", "import serve"),
        ("spear_jax/quant/a.py", "from spear_jax.models.decoder import Decoder"),
        ("serve/a.py", "from jax._src import core"),
    ],
)
def test_a_breach_is_found(relative: str, source: str):
    assert breaches(relative, source)
