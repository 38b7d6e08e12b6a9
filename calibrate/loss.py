"""What training lowers: KL divergence from the reference, and the relative error of the last hidden state."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spear_jax.models.decoder import Decoder
from spear_jax.quant.rows import Int8Rows

_LOGITS_BYTES = 2**29
"""Float32 logits of each model held at a time."""


def distillation_loss(
    reference: Decoder,
    student: Decoder,
    target: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Give mean KL(reference || student) in nats a token, and the relative squared error of the last hidden states."""
    tables = tuple(model.embed if model.head is None else model.head for model in (reference, student))
    wanted_table, table = (_dense_table(table, hidden.dtype) for table in tables)
    total: Any = _summed_kl(wanted_table, table, target, hidden, temperature)
    wanted, got = target.astype(jnp.float32), hidden.astype(jnp.float32)
    relative = jnp.sum(jnp.square(got - wanted), axis=-1) / (jnp.sum(jnp.square(wanted), axis=-1) + 1e-6)
    return total / math.prod(target.shape[:2]), jnp.mean(relative)


def _dense_table(table: Any, dtype: Any) -> Float[Array, "V D"]:
    return table.dequantize(dtype) if isinstance(table, Int8Rows) else table[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_kl(wanted_table: Array, table: Array, target: Array, hidden: Array, temperature: float) -> Array:
    """Sum KL over tokens, differentiable in `hidden` only.

    Logits are computed a piece of the sequence at a time and never again: the gradient, known as soon as they are, is
    what the backward pass keeps of them.
    """
    return _summed_kl_forward(wanted_table, table, target, hidden, temperature)[0]


def _summed_kl_forward(
    wanted_table: Array, table: Array, target: Array, hidden: Array, temperature: float
) -> tuple[Array, Array]:
    batch, length, width = hidden.shape
    pieces = min(length, max(1, math.ceil(4 * batch * length * table.shape[0] / _LOGITS_BYTES)))
    while length % pieces:
        pieces += 1

    def logits(table: Array, states: Array) -> Array:
        return jnp.einsum("btd,vd->btv", states, table, preferred_element_type=jnp.float32) / temperature

    def piece(total: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        wanted, got = logits(wanted_table, pair[0]), logits(table, pair[1])
        wanted_log, got_log = jax.nn.log_softmax(wanted), jax.nn.log_softmax(got)
        share = jnp.exp(wanted_log)
        slope = ((jnp.exp(got_log) - share) / temperature).astype(table.dtype)
        return total + jnp.sum(share * (wanted_log - got_log)), jnp.einsum("btv,vd->btd", slope, table)

    def split(states: Array) -> Array:
        return jnp.moveaxis(states.reshape(batch, pieces, length // pieces, width), 1, 0)

    with jax.named_scope("kl"):
        total, slopes = jax.lax.scan(piece, jnp.zeros((), jnp.float32), (split(target), split(hidden)))
    return total, jnp.moveaxis(slopes, 0, 1).reshape(hidden.shape)


def _summed_kl_backward(temperature: float, slopes: Array, cotangent: Array) -> tuple[None, None, None, Array]:
    del temperature
    return None, None, None, (slopes.astype(jnp.float32) * cotangent).astype(slopes.dtype)


_summed_kl.defvjp(_summed_kl_forward, _summed_kl_backward)
