"""Entry of `python -m spear_jax.serve`, and what of serving is for Python: `from spear_jax import LLM`."""

from serve.cli import main
from serve.offline import LLM

__all__ = ["LLM", "main"]

if __name__ == "__main__":
    main()
