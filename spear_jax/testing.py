"""Helpers for tests: where the shared measuring data lies, and small random models."""

from pathlib import Path

import jax
import numpy as np

from spear_jax.config import ModelConfig


def shared_data(relative: str) -> Path:
    """Give a file of the folder `shared/data` beside or in the checkout; skip the calling test where it is missing."""
    import pytest

    root = Path(__file__).resolve().parent.parent
    for base in (root / "shared", root.parent / "shared"):
        path = base / "data" / relative
        if path.exists():
            return path
    return pytest.skip(f"needs shared/data/{relative}, which is not on this machine")


def random_weights(config: ModelConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw float32 weights for `Decoder.from_weights` that keep activations of order one."""
    from spear_jax.models.decoder import weight_shapes

    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in name:
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        spread = 0.5 if name.endswith("bias") else 1.0 if name == "embed.weight" else shape[-1] ** -0.5
        return (rng.standard_normal(shape) * spread).astype(np.float32)

    return {name: draw(name, shape) for name, shape in weight_shapes(config).items()}


def tiny_config(**changes) -> ModelConfig:
    """Give the configuration of a Llama of three layers that compiles in a second."""
    values = {
        "family": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_layers": 3,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "max_position": 256, "tie_embeddings": True,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def assert_close(actual, expected, *, relative: float) -> None:
    """Assert that ||actual - expected|| <= relative * ||expected|| (Frobenius), element by element finite."""
    actual, expected = np.asarray(jax.device_get(actual), np.float64), np.asarray(jax.device_get(expected), np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all(), "not finite"
    error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error <= relative, f"relative error {error:.2e} > {relative:.2e}"
