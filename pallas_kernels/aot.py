"""Entry of `python -m pallas_kernels.aot`: compile a whole model for accelerators that are not there."""

from serve.aot import main

if __name__ == "__main__":
    main()
