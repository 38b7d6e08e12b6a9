"""Typed, checked access to the settings of a foreign checkpoint: config.json, or the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

from spear_jax.config import RopeScaling


class Settings:
    """A mapping of settings that says which file a missing or malformed value came from.

    A value of None counts as absent, except for `has`. `prefix` goes before every key, as GGUF's `llama.` does.
    """

    def __init__(self, values: Mapping[str, Any], *, source: str, prefix: str = "") -> None:
        self.values = values
        self.source = source
        self.prefix = prefix

    def has(self, key: str) -> bool:
        """Say whether the file names the key, be it with the value null."""
        return self.prefix + key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        """Give the value as it is in the file, or `default`."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Give an integer.

        Raises:
            ValueError: It is absent and there is no default, or it is not an integer.
        """
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self.source}: {self.prefix}{key} must be an integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Give a number.

        Raises:
            ValueError: It is absent and there is no default, or it is not a number.
        """
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.source}: {self.prefix}{key} must be a number, got {value!r}")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Give a truth value.

        Raises:
            ValueError: It is neither true nor false.
        """
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {self.prefix}{key} must be true or false, got {value!r}")
        return value

    def refuse(self, key: str, *allowed: Any) -> None:
        """Refuse a setting that changes the arithmetic in a way this package does not implement.

        Raises:
            ValueError: The file sets the key to something other than null or one of `allowed`.
        """
        value = self.get(key)
        if value is not None and value not in allowed:
            only = f" (only {' or '.join(map(repr, allowed))})" if allowed else ""
            raise ValueError(f"{self.source}: {self.prefix}{key} = {value!r} is not supported{only}")

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"{self.source}: {self.prefix}{key} is missing")
        return value


def hf_fields(settings: Settings, **defaults: int) -> dict[str, Any]:
    """Read from config.json the fields of `ModelConfig` that every family has.

    `defaults` are the family's own, for files that leave out what equals them.
    """

    def integer(key: str) -> int:
        return settings.integer(key, defaults.get(key))

    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    eos = settings.get("eos_token_id", ())
    return {
        "vocab_size": integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": integer("intermediate_size"),
        "num_layers": integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": settings.integer("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        "head_dim": settings.integer("head_dim", defaults.get("head_dim", hidden // heads)),
        "max_position": integer("max_position_embeddings"),
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "bos_id": settings.get("bos_token_id"),
        "eos_ids": (eos,) if isinstance(eos, int) else tuple(eos),
    }


def hf_rope(settings: Settings) -> dict[str, Any]:
    """Read rotary base and scaling of a model with one kind of rotary embedding.

    Takes both forms: `rope_theta` beside `rope_scaling`, and `rope_parameters` of transformers 5.
    """
    parameters = {"rope_theta": settings.get("rope_theta")} | settings.get("rope_parameters", {})
    parameters |= settings.get("rope_scaling", {})
    return {
        "rope_theta": Settings(parameters, source=settings.source).number("rope_theta", 10_000.0),
        "rope_scaling": hf_rope_scaling(parameters, source=settings.source),
    }


def hf_rope_scaling(parameters: Mapping[str, Any], *, source: str) -> RopeScaling | None:
    """Read the scaling out of `rope_scaling` or `rope_parameters`.

    Raises:
        ValueError: Its type is not default, linear or llama3.
    """
    rope = Settings(parameters, source=source)
    rope.refuse("partial_rotary_factor", 1.0)
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return None
        case "linear":
            return RopeScaling(kind="linear", factor=rope.number("factor"))
        case "llama3":
            return RopeScaling(
                kind="llama3",
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position=rope.integer("original_max_position_embeddings"),
            )
        case other:
            raise ValueError(f"{source}: rope type {other!r} is not supported (only default, linear, llama3)")


def hf_layer_is_global(settings: Settings, *, num_layers: int) -> tuple[bool, ...] | None:
    """Read `layer_types`, or give None where the file has none.

    Raises:
        ValueError: A type is neither full_attention nor sliding_attention, or the count is not `num_layers`.
    """
    types = settings.get("layer_types")
    if types is None:
        return None
    if len(types) != num_layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{settings.source}: layer_types must be full_attention or sliding_attention for each of {num_layers} "
            f"layers, got {len(types)} of {sorted(set(types))}"
        )
    return tuple(kind == "full_attention" for kind in types)


def gguf_fields(settings: Settings) -> dict[str, Any]:
    """Read from GGUF metadata the fields of `ModelConfig` that every family has.

    Raises:
        ValueError: A size is missing, or keys, values and rotary embedding differ in width.
    """
    heads, hidden = settings.integer("attention.head_count"), settings.integer("embedding_length")
    head_dim = settings.integer("attention.key_length", hidden // heads)
    kv_heads = settings.get("attention.head_count_kv", heads)
    if isinstance(kv_heads, list):
        if len(set(kv_heads)) != 1:
            raise ValueError(f"{settings.source}: layers that differ in kv heads are not supported: {kv_heads}")
        kv_heads = kv_heads[0]
    settings.refuse("attention.value_length", head_dim)
    settings.refuse("rope.dimension_count", head_dim)
    settings.refuse("expert_count", 0)
    tokens = settings.values.get("tokenizer.ggml.tokens")
    bos, eos = (settings.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    return {
        "vocab_size": len(tokens) if tokens is not None else settings.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": settings.integer("feed_forward_length"),
        "num_layers": settings.integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position": settings.integer("context_length"),
        "norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "bos_id": bos,
        "eos_ids": () if eos is None else (eos,),
    }


def gguf_rope_scaling(settings: Settings) -> RopeScaling | None:
    """Read the scaling of rotary frequencies that the metadata names; `rope_freqs.weight` is a tensor and comes apart.

    Raises:
        ValueError: Its type is not none or linear.
    """
    settings.refuse("rope.scaling.type", "none", "linear")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    unscaled = settings.get("rope.scaling.type") == "none" or factor in (0.0, 1.0)
    return None if unscaled else RopeScaling(kind="linear", factor=factor)
