"""What flows through a model: hidden states, and the second moments of every linear's input."""

import functools
import sys
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spear_jax.models.decoder import Decoder, Layer, Ropes
from spear_jax.nn.attention import Attend, Index, causal_attend
from spear_jax.nn.rope import Rope, apply_rope

type Moments = dict[str, Float[Array, "L K K"]]
type Remat = Literal["none", "dots", "all"]
"""What a backward pass computes again: nothing, all but matrix products, or all but the boundaries of layers."""


def fused_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: Any,
    *,
    layer: Index,
    window: Index,
    scale: float,
    rope: Rope,
) -> tuple[Float[Array, "B T N H"], Any]:
    """Attend causally over the T tokens of the call with cuDNN's fused kernel; windows must not be shorter than T."""
    del layer, window
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn"), cache


def choose_attend(model: Decoder, length: int) -> Attend:
    """Give the fastest causal attention for sequences of `length` tokens that this device and model allow."""
    config = model.config
    half = jnp.dtype(model.dtype) in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() != "gpu" or not half or min(config.windows) < length:
        return causal_attend
    works = _fused_works(length, config.num_heads, config.num_kv_heads, config.head_dim, jnp.dtype(model.dtype).name)
    return fused_attend if works else causal_attend


@functools.cache
def _fused_works(length: int, heads: int, kv_heads: int, width: int, dtype: str) -> bool:
    """Try cuDNN's attention and its gradient once: which shapes it takes depends on its version and the device."""
    q, k = (jnp.zeros((1, length, count, width), dtype) for count in (heads, kv_heads))
    rope = (jnp.ones((1, length, width // 2)), jnp.zeros((1, length, width // 2)))

    def total(q: Array) -> Array:
        return fused_attend(q, k, k, None, layer=0, window=length, scale=1.0, rope=rope)[0].astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(total))(q))
    except Exception as error:  # Refusals come as several types, from JAX's checks and from the library.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"cuDNN attention cannot be used, going on without: {first}", file=sys.stderr)
        return False
    return True


def hidden_states(
    model: Decoder, tokens: Int[Array, "B T"], *, attend: Attend = causal_attend, remat: Remat = "none"
) -> Float[Array, "B T D"]:
    """Compute the hidden states after the final norm."""
    assert isinstance(model.layers, Layer)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ropes = model.ropes(positions)

    def body(x: Array, inputs: tuple[Layer, Array, Array]) -> tuple[Array, None]:
        layer, index, window = inputs
        x, _ = layer(x, ropes, layer=index, window=window, attend=attend, compensators=model.compensators_of(index))
        return x, None

    indices = jnp.arange(model.config.num_layers, dtype=jnp.int32)
    inputs = (model.layers, indices, jnp.asarray(model.config.windows, jnp.int32))
    match remat:
        case "none":
            step = body
        case "dots":
            step = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        case "all":
            step = jax.checkpoint(body)
    with jax.named_scope("layers"):
        x, _ = jax.lax.scan(step, model.embedded(tokens), inputs)
    return model.final_norm(x)


@functools.partial(jax.jit, static_argnames=("attend",))
def _hidden_batch(model: Decoder, tokens: Array, *, attend: Attend) -> Array:
    return hidden_states(model, tokens, attend=attend)


def all_hidden_states(
    model: Decoder, tokens: Int[np.ndarray, "S T"], *, batch_size: int, attend: Attend = causal_attend
) -> Float[Array, "S T D"]:
    """Compute the final hidden states of many sequences, `batch_size` at a time; they stay on the device."""
    return jnp.concatenate(
        [_hidden_batch(model, jnp.asarray(rows), attend=attend) for rows in _batches(tokens, batch_size)]
    )


def _batches(tokens: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


@functools.partial(jax.jit, static_argnames=("attend",))
def run_layer(layer: Layer, x: Float[Array, "B T D"], ropes: Ropes, window: Array, *, attend: Attend) -> Array:
    """Run one layer by itself; one compilation serves all layers of a model."""
    return layer(x, ropes, layer=0, window=window, attend=attend)[0]


@functools.partial(jax.jit, static_argnames=("attend",))
def _measure_layer(
    layer: Layer, x: Array, ropes: Ropes, window: Array, *, attend: Attend
) -> tuple[Array, dict[str, Array]]:
    moments = {}

    def tap(name: str, value: Array) -> None:
        rows = value.reshape(-1, value.shape[-1]).astype(jnp.float32)
        moments[name] = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)

    x, _ = layer(x, ropes, layer=0, window=window, attend=attend, tap=tap)
    return x, moments


def second_moments(
    model: Decoder,
    tokens: Int[np.ndarray, "S T"],
    *,
    batch_size: int = 8,
    attend: Attend = causal_attend,
) -> Moments:
    """Measure `R = E[x x^T]` of the input of each linear in each layer, float32.

    Raises:
        ValueError: A moment is not finite: says the layer and the module.
    """
    length, count = tokens.shape[1], tokens.size
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, length))
    ropes = model.ropes(positions)
    hidden = [model.embedded(jnp.asarray(rows)) for rows in _batches(tokens, batch_size)]
    stacked: dict[str, list[Array]] = {}
    for index, window in enumerate(model.config.windows):
        layer, limit = model.layer(index), jnp.asarray(window, jnp.int32)
        sums: dict[str, Array] = {}
        for i, x in enumerate(hidden):
            x, moments = _measure_layer(layer, x, ropes, limit, attend=attend)
            sums = {name: sums[name] + m if sums else m for name, m in moments.items()}
            hidden[i] = x
        means = {name: total / count for name, total in sums.items()}
        for name, mean in means.items():
            if not bool(jnp.all(jnp.isfinite(mean))):
                raise ValueError(f"layer {index}, {name}: inputs on the calibration text are not finite")
            stacked.setdefault(name, []).append(mean)
    return {name: jnp.stack(parts) for name, parts in stacked.items()}
