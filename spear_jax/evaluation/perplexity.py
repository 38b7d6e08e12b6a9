"""Perplexity over non-overlapping windows of a text."""

import dataclasses
import math

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from spear_jax.evaluation.scoring import LanguageModel, ReportProgress, sequence_logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What a text costs a model: `nll` is the mean cross-entropy in nats over `predictions` next-token predictions."""

    nll: float
    predictions: int
    windows: int
    tokens: int

    @property
    def value(self) -> float:
        """exp(nll); infinite where that overflows."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


def split_windows(
    tokens: Int[np.ndarray, " S"], *, window: int, bos_id: int | None = None, max_windows: int | None = None
) -> tuple[Int32[np.ndarray, "W T"], Bool[np.ndarray, "W T"]]:
    """Cut tokens into windows of `window` tokens, and say which tokens of each are predicted.

    `bos_id` goes before each window, so that the text is cut the same way with and without it: a window of T tokens has
    T - 1 predictions without BOS and T with it. What is left at the end makes a last window, padded to the right, if it
    has a prediction to make.

    Raises:
        ValueError: The text is shorter than one window, or a size makes no sense.
    """
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {window}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"the number of windows must be at least 1, got {max_windows}")
    tokens = np.asarray(tokens, np.int32)
    if tokens.size < window:
        raise ValueError(f"the text has {tokens.size} tokens, fewer than one window of {window}; use a smaller window")
    count = -(-tokens.size // window)
    if bos_id is None and tokens.size % window == 1:
        count -= 1
    count = min(count, max_windows or count)
    used = min(tokens.size, count * window)
    rows = np.pad(tokens[:used], (0, count * window - used)).reshape(count, window)
    mask = (np.arange(count * window) < used).reshape(count, window)
    if bos_id is not None:
        rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=bos_id)
        mask = np.pad(mask, ((0, 0), (1, 0)))
    mask[:, 0] = False
    return rows, mask


def perplexity(
    model: LanguageModel,
    tokens: Int[np.ndarray, " S"],
    *,
    window: int = 1024,
    bos_id: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: ReportProgress | None = None,
) -> Perplexity:
    """Measure exp(mean next-token cross-entropy) of a text in non-overlapping windows, `batch_size` windows at a time.

    The softmax is float32 whatever the model's type; sums over windows are float64. Windows as in `split_windows`.

    Raises:
        ValueError: The text is shorter than one window, or a size makes no sense.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    rows, mask = split_windows(tokens, window=window, bos_id=bos_id, max_windows=max_windows)
    count, predictions = len(rows), int(mask.sum())
    batch_size = min(batch_size, count)
    # Empty rows fill the last batch, so that a single shape is ever compiled.
    filler = ((0, -count % batch_size), (0, 0))
    rows, mask = np.pad(rows, filler), np.pad(mask, filler)
    total = 0.0
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        logprobs, _ = sequence_logprobs(model, rows[batch], mask[batch])
        total -= float(np.asarray(jax.device_get(logprobs), np.float64).sum())
        if progress:
            progress(min(start + batch_size, count), count)
    used = predictions + (count if bos_id is None else 0)
    return Perplexity(nll=total / predictions, predictions=predictions, windows=count, tokens=used)
