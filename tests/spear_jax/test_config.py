import dataclasses

import pytest

from spear_jax.config import UNLIMITED_WINDOW, load_yaml
from spear_jax.testing import tiny_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    ratio: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    count: int = 1
    inner: Inner = dataclasses.field(default_factory=Inner)


def read(tmp_path, text: str) -> Outer:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return load_yaml(Outer, path)


def test_yaml_becomes_nested_dataclasses(tmp_path):
    assert read(tmp_path, "count: 3\ninner: {ratio: 2}") == Outer(count=3, inner=Inner(ratio=2.0))
    assert read(tmp_path, "") == Outer()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("counts: 3", "settings.yaml: unknown key counts; known: count, inner"),
        ("inner: {ration: 1}", r"unknown key inner\.ration"),
        ("count: many", r"count: Input should be a valid integer.*got 'many'"),
        ("- 1", "expected a mapping of settings, got list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"layer_is_global": (True,)}, "layer_is_global has 1 entries for 3 layers"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


def test_windows_follow_the_layer_pattern():
    assert tiny_config().windows == (UNLIMITED_WINDOW,) * 3
    assert tiny_config(sliding_window=8).windows == (8, 8, 8)
    assert tiny_config(sliding_window=8, layer_is_global=(False, True, False)).windows == (8, UNLIMITED_WINDOW, 8)
