"""Entry of `python -m spear_jax.serve`."""

from serve.cli import main

if __name__ == "__main__":
    main()
