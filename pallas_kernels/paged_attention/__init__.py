"""Attention to keys and values that are kept in pages."""

from pallas_kernels.paged_attention.api import paged_attention, paged_decode, paged_write

__all__ = ["paged_attention", "paged_decode", "paged_write"]
