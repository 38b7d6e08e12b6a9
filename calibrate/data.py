"""Calibration text: sampled from the reference model itself, or the user's."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from spear_jax.models.decoder import Decoder
from spear_jax.nn.attention import Index, masked_attention
from spear_jax.nn.rope import Rope, apply_rope

_DRAW_BLOCK = 256
_SPAN = 128
"""Sampling reads keys and values up to the next multiple of this."""

MIN_SEQUENCES = 2
"""Fewest sequences worth calibrating on: one to train on, one held out."""


def first_tokens(
    model: Decoder, *, count: int, bos_share: float, key: Array, exclude: tuple[int, ...] = ()
) -> Int32[np.ndarray, "S 2"]:
    """Give what sampled sequences begin with: BOS and a free token (-1), or a uniformly random token and a free one.

    `bos_share` of the sequences begin with BOS where the model has one. Tokens in `exclude` are not drawn.
    """
    config = model.config
    allowed = np.setdiff1d(np.arange(config.vocab_size), exclude)
    draws = np.asarray(jax.random.randint(key, (count,), 0, len(allowed)))
    first = allowed[draws].astype(np.int32)
    if config.bos_id is not None:
        first[: round(bos_share * count)] = config.bos_id
    return np.stack([first, np.full_like(first, -1)], axis=1)


def prompt_tokens(
    texts: Int[np.ndarray, " N"], *, count: int, longest: int, key: Array
) -> Int32[np.ndarray, "S {longest}+1"]:
    """Cut prompts out of a long text: from anywhere in it, 1 to `longest` tokens, then free ones (-1).

    Raises:
        ValueError: The text is shorter than the longest prompt.
    """
    if not 1 <= longest <= len(texts):
        raise ValueError(f"cannot cut prompts of up to {longest} tokens out of a text of {len(texts)}")
    place_key, size_key = jax.random.split(key)
    places = np.asarray(jax.random.randint(place_key, (count, 1), 0, len(texts) - longest + 1))
    sizes = np.asarray(jax.random.randint(size_key, (count, 1), 1, longest + 1))
    prompts = texts[places + np.arange(longest)].astype(np.int32)
    prompts = np.where(np.arange(longest) < sizes, prompts, -1)
    return np.pad(prompts, ((0, 0), (0, 1)), constant_values=-1)


def draw_tokens(logits: Float[Array, "B V"], *, key: Array) -> Int32[Array, " B"]:
    """Draw from softmax(logits) by inverting the cumulative distribution: one random number a row, not one a token.

    The sums are taken over blocks first, so that a running sum never adds a token's share to a large total.
    """
    batch, vocab = logits.shape
    shares = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    shares = jnp.pad(shares, ((0, 0), (0, -vocab % _DRAW_BLOCK))).reshape(batch, -1, _DRAW_BLOCK)
    sums = jnp.sum(shares, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    drawn = jax.random.uniform(key, (batch, 1)) * ends[:, -1:]
    block = jnp.minimum(jnp.sum(ends <= drawn, axis=-1), sums.shape[-1] - 1)[:, None]
    rest = drawn - jnp.take_along_axis(ends - sums, block, axis=-1)
    inside = jnp.take_along_axis(shares, block[..., None], axis=1)[:, 0]
    place = jnp.sum(jnp.cumsum(inside, axis=-1) <= rest, axis=-1)
    # Rounding may put the drawn number past the last share.
    return jnp.minimum(block[:, 0] * _DRAW_BLOCK + place, vocab - 1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("length",))
def _sample_batch(
    model: Decoder, prefix: Int[Array, "B P"], temperature: Float[Array, ""], key: Array, *, length: int
) -> Int32[Array, "B T"]:
    config, batch = model.config, prefix.shape[0]
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    prefix = jnp.pad(prefix, ((0, 0), (0, length - prefix.shape[1])), constant_values=-1)

    def step(carry: Any, inputs: tuple[Array, Array, Array], *, span: int) -> tuple[Any, Array]:
        (sampled, caches), (position, forced, key) = carry, inputs
        token = jnp.where(forced >= 0, forced, sampled)

        def attend(
            q: Array, k: Array, v: Array, cache: Any, *, layer: Index, window: Index, scale: float, rope: Rope
        ) -> tuple[Array, Any]:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
            keys, values = (
                jax.lax.dynamic_update_slice(whole, jnp.swapaxes(new, 1, 2)[None], (layer, 0, 0, position, 0))
                for whole, new in zip(cache, (k, v), strict=True)
            )
            seen = (jnp.arange(span) <= position) & (jnp.arange(span) > position - window)
            past_k, past_v = (jnp.swapaxes(part[layer, :, :, :span], 1, 2) for part in (keys, values))
            return masked_attention(q, past_k, past_v, seen[None, None], scale=scale), (keys, values)

        positions = jnp.full((batch, 1), position, jnp.int32)
        hidden, caches = model(token[:, None], positions, attend=attend, cache=caches)
        logits = model.logits(hidden[:, 0]) / temperature
        return (draw_tokens(logits, key=key), caches), token

    inputs = (jnp.arange(length, dtype=jnp.int32), prefix.T, jax.random.split(key, length))
    carry = (jnp.zeros(batch, jnp.int32), (jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)))
    tokens = []
    for start in range(0, length, _SPAN):
        part = slice(start, min(start + _SPAN, length))
        carry, drawn = jax.lax.scan(
            functools.partial(step, span=part.stop), carry, jax.tree.map(lambda leaf, part=part: leaf[part], inputs)
        )
        tokens.append(drawn)
    return jnp.concatenate(tokens).T


def sample_tokens(
    model: Decoder,
    *,
    count: int,
    length: int,
    key: Array,
    batch_size: int | None = None,
    temperature: float = 1.0,
    bos_share: float = 0.5,
    prompts: Int[np.ndarray, " N"] | None = None,
    longest_prompt: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Int32[np.ndarray, "S T"]:
    """Sample `count` sequences of `length` tokens from the model itself (ancestral sampling with a KV cache).

    With `prompts`, tokens of a long text, each sequence goes on from a piece of it, of 1 to `longest_prompt` tokens;
    otherwise it begins with BOS or any token. `batch_size` sequences run at a time; None takes what keeps the cache
    within 16 GiB on an accelerator, 1 on a CPU. Sequences go on through end-of-text tokens: a new text follows.

    Raises:
        ValueError: A size makes no sense.
    """
    if count < 1 or length < 2 or length > model.config.max_position:
        limit = model.config.max_position
        raise ValueError(f"cannot sample {count} sequences of {length} tokens: expected at least 1 of 2 to {limit}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    config = model.config
    if batch_size is None:
        row = 2 * config.num_layers * length * config.num_kv_heads * config.head_dim * model.dtype.itemsize
        limit = 2**30 if jax.default_backend() == "cpu" else 2**34
        batch_size = min(2048, max(1, limit // row))
    batches = math.ceil(count / min(batch_size, count))
    batch_size = math.ceil(count / batches)
    start_key, order_key, key = jax.random.split(key, 3)
    if prompts is None:
        special = (*config.eos_ids, *(() if config.bos_id is None else (config.bos_id,)))
        prefix = first_tokens(model, count=batches * batch_size, bos_share=bos_share, key=start_key, exclude=special)
    else:
        longest = min(longest_prompt, length - 1)
        prefix = prompt_tokens(prompts, count=batches * batch_size, longest=longest, key=start_key)
    prefix = prefix.reshape(batch_size, batches, -1).swapaxes(0, 1)
    rows = []
    for i, batch_key in enumerate(jax.random.split(key, batches)):
        scale = jnp.asarray(temperature, jnp.float32)
        rows.append(np.asarray(_sample_batch(model, jnp.asarray(prefix[i]), scale, batch_key, length=length)))
        if progress:
            progress(min(count, (i + 1) * batch_size), count)
    return np.concatenate(rows)[np.asarray(jax.random.permutation(order_key, batches * batch_size))[:count]]


def read_texts(source: str) -> list[str]:
    """Read the user's texts: a text file, a jsonl file with a `text` field, or the id of a dataset on the hub.

    A dataset is `org/name`, `org/name:config` or either with `@split` behind it (`train` where none is given).

    Raises:
        FileNotFoundError: There is no such file, and it is no dataset's id.
        ValueError: The file is empty or is not what its name says.
    """
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
        texts = _json_texts(path, text) if path.suffix == ".jsonl" else [text]
    elif path.suffix in (".txt", ".jsonl", ".json") or source.startswith((".", "/")) or "/" not in source:
        raise FileNotFoundError(f"{source}: no such file")
    else:
        texts = _dataset_texts(source)
    if not any(text.strip() for text in texts):
        raise ValueError(f"{source}: the calibration text is empty")
    return texts


def _json_texts(path: Path, text: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'{path}:{number}: expected an object with a string "text"')
        texts.append(row["text"])
    return texts


def _dataset_texts(source: str) -> list[str]:
    import datasets

    name, _, split = source.partition("@")
    name, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
        texts, size = [], 0
        for row in rows:
            texts.append(row["text"])
            size += len(texts[-1])
            if size > 40_000_000:
                break
        return texts
    except KeyError:
        raise ValueError(f'dataset {source}: rows have no "text" column') from None
    except Exception as error:
        raise ValueError(f"dataset {source}: cannot be read: {error}") from None


def cut_tokens(tokens: Int[np.ndarray, " N"], *, count: int, length: int, key: Array) -> Int32[np.ndarray, "S T"]:
    """Cut a text's tokens into `count` sequences of `length` drawn without replacement, or as many as there are.

    Raises:
        ValueError: The text is too short for two sequences.
    """
    have = len(tokens) // length
    if have < MIN_SEQUENCES:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, expected at least {MIN_SEQUENCES * length} "
            f"({MIN_SEQUENCES} sequences of {length})"
        )
    chosen = np.asarray(jax.random.permutation(key, have))[:count]
    return tokens[: have * length].reshape(have, length)[chosen]


def calibration_tokens(
    model: Decoder,
    texts: list[str],
    encode: Callable[[str], list[int]],
    *,
    count: int,
    length: int,
    text_share: float,
    longest_prompt: int,
    bos_share: float,
    key: Array,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Int32[np.ndarray, "S T"], Bool[np.ndarray, " S"]]:
    """Give calibration sequences in random order, and which of them the model itself has written.

    `text_share` of them are cut from `texts`, as far as those go; the model writes the rest, each going on from a piece
    of the texts of up to `longest_prompt` tokens or, where that is 0 or there is no text, from BOS or any token.

    Raises:
        ValueError: The texts are too short.
    """
    cut_key, sample_key, order_key = jax.random.split(key, 3)
    tokens = np.asarray([token for text in texts for token in encode(text)], np.int32)
    parts = []
    wanted = round(text_share * count) if texts else 0
    if wanted:
        parts.append(cut_tokens(tokens, count=wanted, length=length, key=cut_key))
    taken = sum(map(len, parts))
    if count > taken and (text_share < 1 or not texts):
        prompts = tokens if texts and longest_prompt else None
        parts.append(
            sample_tokens(
                model,
                count=count - taken,
                length=length,
                key=sample_key,
                bos_share=bos_share,
                prompts=prompts,
                longest_prompt=longest_prompt,
                progress=progress,
            )
        )
    together = np.concatenate(parts)
    order = np.asarray(jax.random.permutation(order_key, len(together)))
    return together[order], order >= taken
