"""Entry of `python -m spear_jax.calibrate`."""

from calibrate.cli import main

if __name__ == "__main__":
    main()
