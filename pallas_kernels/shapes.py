"""Weights of models that kernels are tuned and timed on, without JAX: processes of other libraries read them too."""

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "llama-3.1-8b": {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096)},
    "llama-3.2-1b": {"o": (2048, 2048), "qkv": (3072, 2048), "down": (2048, 8192), "gate_up": (16384, 2048)},
    "qwen2.5-7b": {"o": (3584, 3584), "qkv": (4608, 3584), "down": (3584, 18944), "gate_up": (37888, 3584)},
    "llama-2-13b": {"o": (5120, 5120), "qkv": (15360, 5120), "down": (5120, 13824), "gate_up": (27648, 5120)},
    "llama-3.1-70b-tp2": {"o": (8192, 4096), "qkv": (5120, 8192), "down": (8192, 14336), "gate_up": (28672, 8192)},
}
"""Weights [N, K] of models' layers, the most important model first; products that share an input are one.

Of the 70B model what one of two devices holds: half of N where columns are divided (qkv, gate_up), of K where rows are.
"""

ROWS = (1, 16, 32, 64, 4, 8, 128, 512, 2048, 8192)
"""Rows of x that are timed, the most important first."""

CACHE_BYTES = 120 * 2**20
"""Bytes that go through the second-level cache between two uses of a weight; Hopper's holds 50 MiB."""


def copies(nbytes: int) -> int:
    """Give how many weights of `nbytes` to take turns with, so that none is in the cache when its turn comes."""
    return max(2, -(-CACHE_BYTES // nbytes))
