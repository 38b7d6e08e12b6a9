"""Configuration of a model's architecture, and YAML files read into frozen dataclasses."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast

UNLIMITED_WINDOW = 2**30
"""A sliding window that never ends: the window of a layer that attends to everything before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    `linear` divides every frequency by `factor`. `llama3` divides the low ones, keeps the high ones and blends between
    (Llama 3.1 model card). `factors` divides frequency `i` by `factors[i]` (GGUF's `rope_freqs.weight`).
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a decoder; sizes are counts of elements.

    `layer_is_global` says for each layer whether it attends to everything (True) or to `sliding_window` keys, itself
    included; None means that every layer uses `sliding_window` where it is set. `rope_local_theta` is the rotary base
    of sliding-window layers where it differs (Gemma-3); those layers take no `rope_scaling`.
    """

    family: Literal["llama", "qwen2", "qwen3", "gemma3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    sliding_window: int | None = None
    layer_is_global: tuple[bool, ...] | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    attention_scale: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = ("vocab_size", "num_layers", "num_heads", "num_kv_heads")
        widths = ("hidden_size", "intermediate_size", "head_dim", "max_position")
        for name in counts + widths:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary embeddings")
        if self.layer_is_global is not None and len(self.layer_is_global) != self.num_layers:
            raise ValueError(f"layer_is_global has {len(self.layer_is_global)} entries for {self.num_layers} layers")

    @property
    def scale(self) -> float:
        """The factor on q k^T before the softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def qkv_features(self) -> int:
        """Rows of the fused q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer, how many keys a query sees, itself included."""
        limit = self.sliding_window or UNLIMITED_WINDOW
        layer_is_global = self.layer_is_global or (False,) * self.num_layers
        return tuple(UNLIMITED_WINDOW if is_global else limit for is_global in layer_is_global)

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Give (N out, K in) of the four quantized linears of a layer."""
        return {
            "qkv": (self.qkv_features, self.hidden_size),
            "o": (self.hidden_size, self.num_heads * self.head_dim),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }


def parse_mapping[T](cls: type[T], values: Any, *, source: str) -> T:
    """Turn a plain mapping into the dataclass `cls`, converting types and refusing unknown keys.

    Raises:
        ValueError: A key is unknown or a value has the wrong type; says which, where, and what was expected.
    """
    import pydantic

    unknown = sorted(_unknown_keys(cls, values))
    if unknown:
        known = ", ".join(f.name for f in dataclasses.fields(cast(Any, cls)))
        raise ValueError(f"{source}: unknown key {', '.join(unknown)}; known: {known}")
    adapter = pydantic.TypeAdapter(cls)
    try:
        return adapter.validate_python(values)
    except pydantic.ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise ValueError(f"{source}: {details}") from None


def load_yaml[T](cls: type[T], path: str | Path) -> T:
    """Read a YAML file into the dataclass `cls`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, not a mapping, or has an unknown key or a value of the wrong type.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"settings file {path} does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return parse_mapping(cls, values or {}, source=str(path))


def _unknown_keys(cls: Any, values: Any, prefix: str = "") -> list[str]:
    """List keys of `values` that no field of the (nested) dataclass takes; pydantic lets them pass for stdlib ones."""
    if not (dataclasses.is_dataclass(cls) and isinstance(values, dict)):
        return []
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    found = []
    for key, value in values.items():
        if key not in fields:
            found.append(f"{prefix}{key}")
        else:
            found += _unknown_keys(fields[key], value, prefix=f"{prefix}{key}.")
    return found
