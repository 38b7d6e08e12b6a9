"""Building blocks of decoders, as Flax NNX modules that are plain pytrees to `jax.jit`."""
