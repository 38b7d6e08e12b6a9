"""Serve 4-bit language models in JAX at the quality of 16 bits."""
