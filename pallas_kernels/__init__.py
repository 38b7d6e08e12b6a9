"""Kernels of spear-jax: each operation has one public function, an XLA reference, and a file per accelerator."""
