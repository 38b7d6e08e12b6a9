"""Where values stop being finite: the layer and the module to name when training has to stop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.int4_matmul import Activation
from spear_jax.models.decoder import MODULES, NORMS, Decoder, Layer
from spear_jax.nn.attention import Attend, causal_attend
from spear_jax.nn.linear import Linear, RMSNorm


def first_not_finite(model: Decoder, tokens: Int[Array, "B T"], *, attend: Attend = causal_attend) -> str | None:
    """Say what first gives NaN or infinite values on some tokens, layer by layer; None where all is finite."""
    x = model.embedded(tokens)
    if not _finite(x):
        return "the embedding"
    ropes = model.ropes(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    for index, window in enumerate(model.config.windows):
        layer, found = _watched(model.layer(index))
        own = model.compensators_of(index)
        x, _ = layer(x, ropes, layer=index, window=window, attend=attend, compensators=own)
        if found or not _finite(x):
            return f"layer {index}, {found[0] if found else 'the residual stream'}"
    return None if _finite(model.final_norm(x)) else "final_norm"


def _watched(layer: Layer) -> tuple[Layer, list[str]]:
    """Give a layer that, as it runs, fills a list with the names of what is not finite, in order."""
    found: list[str] = []
    for name in (*MODULES, *NORMS):
        if (part := getattr(layer, name)) is not None:
            setattr(layer, name, _Watch(name, part, found))
    return layer, found


@dataclasses.dataclass(frozen=True)
class _Watch:
    """Runs a part of a layer, and adds its name to `found` where it gives or gets what is not finite."""

    name: str
    part: Linear | RMSNorm
    found: list[str]

    def __call__(self, x: Array, **options: Any) -> Array:
        y = self.part(x, **options)
        if not (_finite(x) and _finite(y)):
            self.found.append(self.name if _finite(x) else f"the input of {self.name}")
        return y

    @property
    def activation(self) -> Activation | None:
        """Give what the product of a linear ends with."""
        return self.part.activation if isinstance(self.part, Linear) else None

    def of_sum(self, residual: Array, update: Array | None, **_: Any) -> tuple[Array, Array, None]:
        """Do what `RMSNorm.of_sum` does, leaving coordinates to the product that wants them."""
        total = residual if update is None else residual + update
        return self(total), total, None


def broken_gradients(gradient: dict[str, Any], ranks: dict[str, tuple[int, ...]]) -> str | None:
    """Say in which layer gradients stop being finite: the highest, as they come down from the last; None if nowhere.

    `gradient` are groups of arrays by module, with a leading axis of layers; those of single rank coordinates have one
    of rows instead, of which `ranks` says how many each layer has.
    """
    layers: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rows = np.asarray(jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1))
        if rows.all():
            continue
        group, module, *part = name.split(".")
        if module == "final_norm":
            return f"the gradient of {name}"
        layer = np.arange(len(rows))
        if group == "factors" or (group == "gates" and part[0] in ("w_in", "w_out", "b_out")):
            layer = np.repeat(np.arange(len(ranks[module])), ranks[module])
        layers[name] = int(layer[~rows].max())
    if not layers:
        return None
    top = max(layers.values())
    return f"layer {top}, the gradient of {', '.join(name for name, layer in layers.items() if layer == top)}"


def _finite(x: Array) -> bool:
    return bool(jnp.all(jnp.isfinite(x)))
