"""Settings of the whole suite: strict types, quiet accelerators, no network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of XLA on a CPU, by default one a core. In an interpreted GPU kernel each warpgroup that waits at a barrier
# holds one: with too few, all wait for ever.
os.environ.setdefault("NPROC", "32")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
