"""The decoder-only transformer that all supported families share, differing by their `ModelConfig`."""

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import platform
from pallas_kernels.int4_matmul import Compensator
from pallas_kernels.tails import glu_project
from spear_jax.config import UNLIMITED_WINDOW, ModelConfig
from spear_jax.nn.attention import Attend, Index, causal_attend
from spear_jax.nn.linear import Linear, RMSNorm
from spear_jax.nn.rope import Rope, rope_frequencies, rope_tables
from spear_jax.nn.row_parallel import PeerCache, PeerResidual, RowParallel
from spear_jax.quant.compensator import CompensatorBank
from spear_jax.quant.qtensor import QuantTensor
from spear_jax.quant.rows import DividedRows, Int8Rows

MODULES = ("qkv", "o", "gate_up", "down")
"""The linears of a layer that are quantized; q, k, v are one product and so are gate, up: they share their input."""

NORMS = ("input_norm", "mlp_norm", "q_norm", "k_norm", "attn_out_norm", "mlp_out_norm")
"""The norms of a layer; a family that lacks one has None there."""

type Tap = Callable[[str, Array], None]
type Ropes = tuple[Float[Array, "2 B T H/2"], Float[Array, "2 B T H/2"]]


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Give the name and shape of every weight of a model, stacked over layers: what `Decoder.from_weights` takes.

    Linears are [L, N out, K in]; rows of `qkv` are all query heads, then keys, then values; of `gate_up`, gate then up.
    Heads are in half-split rotary order. Norm weights are whole multipliers (Gemma's `1 + w`).
    """
    d, h, layers = config.hidden_size, config.head_dim, config.num_layers
    shapes = {"embed.weight": (config.vocab_size, d), "final_norm.weight": (d,)}
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, d)
    for module, shape in config.module_shapes().items():
        shapes[f"layers.{module}.weight"] = (layers, *shape)
    if config.qkv_bias:
        shapes["layers.qkv.bias"] = (layers, config.qkv_features)
    for norm, size in _norm_sizes(d, h, config).items():
        shapes[f"layers.{norm}.weight"] = (layers, size)
    return shapes


def _norm_sizes(d: int, h: int, config: ModelConfig) -> dict[str, int]:
    norms = {"input_norm": d, "mlp_norm": d}
    if config.qk_norm:
        norms |= {"q_norm": h, "k_norm": h}
    if config.sandwich_norms:
        norms |= {"attn_out_norm": d, "mlp_out_norm": d}
    return norms


class Layer(nnx.Module):
    """One decoder layer; its arrays may carry a leading axis of layers, which `jax.lax.scan` takes off."""

    def __init__(self, config: ModelConfig, weights: MutableMapping[str, Array]) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights[f"layers.{name}.weight"], eps=config.norm_eps)

        def linear(name: str) -> Linear:
            return Linear(weights[f"layers.{name}.weight"], weights.get(f"layers.{name}.bias"))

        self.config = config
        self.input_norm, self.mlp_norm = norm("input_norm"), norm("mlp_norm")
        self.q_norm, self.k_norm = (norm("q_norm"), norm("k_norm")) if config.qk_norm else (None, None)
        self.attn_out_norm, self.mlp_out_norm = (
            (norm("attn_out_norm"), norm("mlp_out_norm")) if config.sandwich_norms else (None, None)
        )
        self.qkv, self.o = linear("qkv"), linear("o")
        self.gate_up, self.down = linear("gate_up"), linear("down")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ropes: Ropes,
        cache: Any = None,
        *,
        layer: Index,
        window: Index,
        attend: Attend = causal_attend,
        compensators: Mapping[str, Compensator | None] | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Run the layer with its own `compensators`; `tap(name, x)` sees the input of each of the four linears."""
        x, update, cache = self.unsummed(
            *(x, None, ropes, cache), layer=layer, window=window, attend=attend, compensators=compensators, tap=tap
        )
        return x + update, cache

    def unsummed(
        self,
        x: Float[Array, "B T D"],
        update: Float[Array, "B T D"] | None,
        ropes: Ropes,
        cache: Any = None,
        *,
        layer: Index,
        window: Index,
        attend: Attend = causal_attend,
        compensators: Mapping[str, Compensator | None] | None = None,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Any]:
        """Run the layer on `x + update`, and give its own result as such a pair, as `RMSNorm.of_sum` takes it.

        On a GPU that spares an addition between layers its launch.
        """
        config, own = self.config, compensators or {}

        def apply(name: str, x: Array, z: Array | None = None) -> Array:
            if tap is not None:
                tap(name, x)
            with jax.named_scope(name):
                return getattr(self, name)(x, compensator=own.get(name), z=z)

        def before(name: str) -> Compensator | None:
            """Give the compensator of a linear whose coordinates come with its input; else its product makes them."""
            compensator = own.get(name)
            if compensator is None or platform() == "cpu" or isinstance(getattr(self, name), RowParallel):
                return None
            return None if compensator.a is None else compensator

        def normed(update: Array, norm: RMSNorm | None) -> Array:
            return update if norm is None else norm(update)

        with jax.named_scope("attention"):
            normal, x, z = self.input_norm.of_sum(x, update, compensator=before("qkv"))
            qkv = apply("qkv", normal, z)
            heads = qkv.reshape(*qkv.shape[:-1], -1, config.head_dim)
            q, k, v = jnp.split(heads, np.cumsum([config.num_heads, config.num_kv_heads]), axis=-2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            rope = _select_rope(ropes, window, config)
            attended, cache = attend(q, k, v, cache, layer=layer, window=window, scale=config.scale, rope=rope)
            update = normed(apply("o", attended.reshape(*x.shape[:2], -1)), self.attn_out_norm)
        with jax.named_scope("mlp"):
            normal, x, z = self.mlp_norm.of_sum(x, update, compensator=before("gate_up"))
            product, z = apply("gate_up", normal, z), None
            if self.gate_up.activation is None:
                product, z = glu_project(product, activation=config.activation, compensator=before("down"))
            update = normed(apply("down", product, z), self.mlp_out_norm)
        return x, update, cache


def _select_rope(ropes: Ropes, window: Index, config: ModelConfig) -> Rope:
    """Pick the global tables, or the local ones where this layer slides and the family has its own base for that."""
    if config.rope_local_theta is None:
        return ropes[0][0], ropes[1][0]
    if isinstance(window, int):
        local = int(window < UNLIMITED_WINDOW)
        return ropes[0][local], ropes[1][local]
    return tuple(jnp.where(window < UNLIMITED_WINDOW, table[1], table[0]) for table in ropes)  # type: ignore[return-value]


class Decoder(nnx.Module):
    """A language model: embedding, layers, final norm, head. A pytree: pass it to `jax.jit` as an argument.

    `layers` is one `Layer` whose arrays are stacked over layers, run by `jax.lax.scan`; or, after `unstack`, an
    `nnx.List` of layers, run one after another (on CPU a scan copies every layer's weights out of the stack).
    `compensators` maps module names to the banks of error compensators, or after `unstack` to one of each layer.
    """

    def __init__(self, config: ModelConfig, weights: MutableMapping[str, Array]) -> None:
        self.config = config
        self.embed: nnx.Param | Int8Rows | DividedRows = nnx.Param(weights["embed.weight"])
        self.layers: Layer | nnx.List = Layer(config, weights)
        self.final_norm = RMSNorm(weights["final_norm.weight"], eps=config.norm_eps)
        self.head: nnx.Param | Int8Rows | DividedRows | None = (
            None if config.tie_embeddings else nnx.Param(weights["head.weight"])
        )
        self.compensators: nnx.Dict = nnx.Dict()

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: MutableMapping[str, Any], *, dtype: Any) -> "Decoder":
        """Build a model from the weights that `weight_shapes` names, putting each on the device as `dtype`.

        Norms and biases stay float32: they are few, and gains near one lose half their digits in bfloat16. Linears may
        be `QuantTensor`, which stay as they are.
        Entries are taken out of `weights` one at a time, so that the host need not hold the model twice.

        Raises:
            ValueError: A weight is missing, left over, or of the wrong shape.
        """
        shapes = weight_shapes(config)
        if shapes.keys() != weights.keys():
            missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
            raise ValueError(f"weights do not fit the configuration: missing {missing}, not expected {extra}")
        arrays = {}
        for name, shape in shapes.items():
            weight = weights.pop(name)
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name} has shape {list(weight.shape)}, expected {list(shape)}")
            if isinstance(weight, QuantTensor):
                arrays[name] = jax.tree.map(jnp.asarray, weight)
                continue
            arrays[name] = jnp.asarray(weight, dtype=jnp.float32 if "norm" in name or name.endswith("bias") else dtype)
        return cls(config, arrays)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the activations."""
        return self.embed.dtype

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        *,
        attend: Attend = causal_attend,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Compute hidden states after the final norm, and the updated cache; positions default to 0, 1, ...

        Where layers are stacked, `cache` is one for all of them; where they are separate, a tuple with one for each,
        or one whose `of_layer(i)` gives what layer i takes, and `with_layer` takes what that became.
        Separate layers of one window are traced once for all, if their arrays are alike and `attend` is a
        `jax.tree_util.Partial` or a function without captured arrays.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, update, ropes = self.embedded(tokens), None, self.ropes(positions)
        windows = self.config.windows
        with jax.named_scope("layers"):
            if shared := isinstance(cache, PeerCache):
                x, cache = PeerResidual(h=x, inbox=cache.inbox), cache.cache
            if isinstance(self.layers, nnx.List):
                partial = attend if isinstance(attend, jax.tree_util.Partial) else jax.tree_util.Partial(attend)
                # Zeros rather than None: the first layer is traced with the others.
                caches, update = [], jnp.zeros(x.shape, self.dtype)
                whole = hasattr(cache, "of_layer")
                for i, layer in enumerate(self.layers):
                    own, part = self.compensators_of(i), None
                    if cache is not None:
                        part = cache.of_layer(i) if whole else cache[i]
                    x, update, part = _separate_layer(layer, x, update, ropes, part, partial, own, window=windows[i])
                    if cache is not None and whole:
                        cache = cache.with_layer(part)
                    caches.append(part)
                cache = tuple(caches) if isinstance(cache, tuple) else cache
            else:

                def body(carry: tuple[Array, Any], inputs: tuple[Layer, Array, Array]):
                    (x, cache), (layer, i, window) = carry, inputs
                    own = self.compensators_of(i)
                    return layer(x, ropes, cache, layer=i, window=window, attend=attend, compensators=own), None

                indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
                inputs = (self.layers, indices, jnp.asarray(windows, jnp.int32))
                assert not isinstance(x, PeerResidual), "layers with an inbox are separate ones"
                (x, cache), _ = jax.lax.scan(body, (x, cache), inputs)
        normal, x, _ = self.final_norm.of_sum(x, update)
        return normal, PeerCache(cache=cache, inbox=x.inbox) if shared else cache

    @jax.named_scope("embed")
    def embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up and scale the embeddings of tokens."""
        x = self.embed.take(tokens) if isinstance(self.embed, Int8Rows | DividedRows) else self.embed[...][tokens]
        return x if self.config.embed_scale == 1 else x * jnp.asarray(self.config.embed_scale, x.dtype)

    def ropes(self, positions: Int[Array, "B T"]) -> Ropes:
        """Give the cosines and the sines of positions, each stacked as (global, local)."""
        config = self.config
        tables = [rope_tables(positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))]
        if config.rope_local_theta is not None:
            tables.append(rope_tables(positions, rope_frequencies(config.head_dim, config.rope_local_theta, None)))
        cos, sin = zip(*tables, strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    @jax.named_scope("head")
    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Compute next-token logits in float32."""
        table = self.embed if self.head is None else self.head
        if isinstance(table, Int8Rows | DividedRows):
            return table.matmul(hidden)
        return jnp.einsum("...d,vd->...v", hidden, table[...], preferred_element_type=jnp.float32)

    def compensators_of(self, layer: Index) -> dict[str, Compensator | None]:
        """Give the compensators of one layer by module; None where a module has none."""
        return {name: bank.at(layer) for name, bank in self.compensators.items()}

    def layer(self, index: int) -> Layer:
        """Give one layer by itself."""
        if isinstance(self.layers, nnx.List):
            return self.layers[index]
        return jax.tree.map(lambda leaf: leaf[index], self.layers)

    def replace(self, **fields: Any) -> "Decoder":
        """Give a model with some fields replaced, sharing all other arrays with this one."""
        model = jax.tree.map(lambda leaf: leaf, self)
        for name, value in fields.items():
            setattr(model, name, value)
        return model


nnx.register_data_type(Compensator)


class SeparateCompensators(nnx.Module):
    """The compensators of one module in all layers, each layer's arrays by themselves and all of the same rank."""

    def __init__(self, layers: Sequence[Compensator]) -> None:
        self.layers = nnx.List(layers)

    def at(self, layer: int) -> Compensator:
        """Give the compensator of one layer."""
        return self.layers[layer]


@functools.partial(jax.jit, static_argnames=("window",))
def _separate_layer(
    layer: Layer,
    x: Float[Array, "B T D"],
    update: Float[Array, "B T D"],
    ropes: Ropes,
    cache: Any,
    attend: jax.tree_util.Partial,
    compensators: dict[str, Compensator | None],
    *,
    window: int,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Any]:
    """Run one of several separate layers, with a cache of its own.

    Jitted so that a program of thirty layers is traced from one: 15 of 23 s of a warm start were tracing.
    """
    return layer.unsummed(x, update, ropes, cache, layer=0, window=window, attend=attend, compensators=compensators)


def unstack(model: Decoder) -> Decoder:
    """Give the model with layers as separate modules, for back ends where slicing a stack copies.

    Layers of lower rank get a compensator as wide as the widest of their module, padded with rows that add nothing:
    layers that are alike in shape are traced and compiled as one.
    """
    count = model.config.num_layers
    padded = jax.jit(CompensatorBank.at)
    compensators = {
        name: SeparateCompensators([padded(bank, np.int32(i)) for i in range(count)])
        for name, bank in model.compensators.items()
        if any(bank.ranks)
    }
    return model.replace(layers=nnx.List([model.layer(i) for i in range(count)]), compensators=nnx.Dict(compensators))
