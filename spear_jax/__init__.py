"""Serve 4-bit language models in JAX at the quality of 16 bits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spear_jax.serve import LLM

__all__ = ["LLM"]


def __getattr__(name: str) -> Any:
    """Import what is offered here when it is asked for: this package is below the one that has it."""
    if name == "LLM":
        from spear_jax.serve import LLM

        return LLM
    raise AttributeError(f"module 'spear_jax' has no attribute {name!r}")
