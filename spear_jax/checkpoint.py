"""Checkpoints of quantized models: packed int4 codes, compensators, configuration and tokenizer in one directory.

The directory is an Orbax checkpoint whose custom metadata describe the model, and a `manifest.json` with the size and
checksum of every file. It is written beside its place and renamed into it, so that it is there whole or not at all.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from pallas_kernels.int4_matmul import Gate
from pallas_kernels.packing import pack_int4, unpack_int4
from spear_jax.atomic import MANIFEST, verify_manifest, writing_directory
from spear_jax.config import ModelConfig, parse_mapping
from spear_jax.models import DType, LoadedModel, activation_dtype
from spear_jax.models.decoder import MODULES, Decoder, Layer, weight_shapes
from spear_jax.nn.linear import Linear
from spear_jax.quant import Bits, CompensatorBank, Int8Rows, QuantTensor
from spear_jax.sharding import same_everywhere
from spear_jax.tokenizer import tokenizer_from_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2
"""Version of the layout; checkpoints of a higher one are refused. 2: factors of 4 bits, which format 1 has not."""

STORED_DTYPE = jnp.dtype(jnp.bfloat16)
"""What embedding and head are stored in, whatever the model was calibrated in."""

_SPARE_BYTES = 1 << 20
"""Room asked for beyond the arrays and the tokenizer: Orbax's own metadata."""

_PATH_BYTES = 4096

type ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
type Component = Literal[
    "int4 codes", "int4 scales", "embedding", "head", "norms", "biases", "compensator factors", "compensator gates"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """How one module's stack of int4 weights is laid out."""

    groups: int
    asymmetric: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Shape and type of an array."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BankLayout:
    """How one module's compensators are laid out: rank per layer, type of the factors, the arrays that a gate has.

    Factors of 4 `bits` are stored two codes in a byte, as int4 weights are.
    """

    ranks: tuple[int, ...]
    int8: bool
    bits: Bits = 8
    gate: dict[str, ArrayLayout] | None = None
    gate_form: Literal["tanh", "linear", "shift"] = "tanh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself; `details` is what its writer gave as `metadata`."""

    format: int
    writer: str
    name: str
    config: ModelConfig
    linears: dict[str, LinearLayout]
    compensators: dict[str, BankLayout]
    tokenizer: dict[str, str]
    details: dict[str, Any]


def save_checkpoint(
    path: str | Path,
    model: Decoder,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    name: str,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a quantized model to the directory `path`, at once or not at all.

    Where several processes share a model (`jax.distributed`) all must call it, and each writes what it has, to a disk
    that they share. Embedding and head are stored in bfloat16, everything else as it is. `metadata` (JSON values) is
    kept beside the model. Leftovers of earlier writes to `path` that were killed are removed.

    Raises:
        ValueError: A linear is not int4, a table is int8, layers are not stacked, or `metadata` is not JSON.
        FileExistsError: Something is at `path`, and it is not a checkpoint that `overwrite` allows to replace.
        OSError: The disk is full or cannot be written; nothing is left behind, and what was at `path` stays.
    """
    from orbax.checkpoint import v1 as ocp

    if isinstance(model.embed, Int8Rows) or isinstance(model.head, Int8Rows):
        raise ValueError("a checkpoint keeps embedding and head in bfloat16: round them to int8 after loading")
    arrays = _as_stored(model)
    description = {
        "format": FORMAT,
        "writer": f"spear_jax {version('spear-jax')}",
        "name": name,
        "config": dataclasses.asdict(model.config),
        "linears": {module: dataclasses.asdict(_linear_layout(model, module)) for module in MODULES},
        "compensators": {module: dataclasses.asdict(_bank_layout(bank)) for module, bank in model.compensators.items()},
        "tokenizer": _tokenizer_files(tokenizer),
        "details": dict(metadata or {}),
    }
    try:
        described = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of the checkpoint cannot be written as JSON: {error}") from None

    size = sum(array.nbytes for array in arrays.values()) + len(described) + _SPARE_BYTES
    with writing_together(path, size=size, overwrite=overwrite) as partial:
        ocp.save(os.fspath(partial), _of_all(arrays), custom_metadata=json.loads(described))


def _of_all(arrays: dict[str, Array]) -> dict[str, Array]:
    """Give arrays that every process has alike as ones that all hold together, of which each writes a part."""
    if jax.process_count() == 1:
        return arrays
    mesh = Mesh(np.asarray(jax.devices()), ("copies",))
    return {
        name: same_everywhere(np.asarray(array), mesh) if array.is_fully_addressable else array
        for name, array in arrays.items()
    }


@contextlib.contextmanager
def writing_together(path: str | Path, *, size: int, overwrite: bool = False) -> Iterator[Path]:
    """Give all processes one place to write a directory to, as `writing_directory` does: process 0 puts it in place.

    Raises:
        FileExistsError, OSError: As there; the other processes raise OSError.
    """
    if jax.process_count() == 1:
        with writing_directory(path, size=size, overwrite=overwrite) as partial:
            yield partial
        return
    from jax.experimental.multihost_utils import broadcast_one_to_all

    def agree(text: str) -> str:
        said = np.frombuffer(text.encode().ljust(_PATH_BYTES), np.uint8)
        return bytes(np.asarray(broadcast_one_to_all(said))).decode().rstrip()

    if jax.process_index():
        if not (place := agree("")):
            raise OSError(f"{path}: process 0 cannot write it")
        yield Path(place)
        if not agree("") or not agree(""):
            raise OSError(f"{path}: process 0 could not write it, or put it in place")
        return
    try:
        with writing_directory(path, size=size, overwrite=overwrite) as partial:
            agree(os.fspath(partial))
            yield partial
            agree("written")
    except BaseException:
        agree("")
        raise
    agree("in place")


def load_checkpoint(
    path: str | Path,
    *,
    dtype: DType = "auto",
    shardings: ShardingOf | None = None,
) -> LoadedModel:
    """Read a checkpoint into a model whose activations are `dtype` (auto: float32 on a CPU, bfloat16 elsewhere).

    `shardings(name, shape)` says where an array goes, by names such as `layers.qkv.weight.packed`; without it all go to
    the first device. Every file is checked against the manifest first.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It is no checkpoint of this package, of a newer format, or damaged; says which.
    """
    from orbax.checkpoint import v1 as ocp

    chosen = activation_dtype(dtype)
    info, stored = _read(Path(path))
    verify_manifest(Path(path), contents=True)
    skeleton = _skeleton(info, source=str(path))
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {}
    for key, leaf in jax.eval_shape(_as_stored, skeleton).items():
        found = stored.pop(key, None)
        if found is None or found.shape != leaf.shape or _is_integer(found) != _is_integer(leaf):
            described = "missing" if found is None else f"{found.dtype}{list(found.shape)}"
            raise ValueError(
                f"{path}: {key} is {described}, expected {leaf.dtype}{list(leaf.shape)} from the configuration"
            )
        leaf_dtype = chosen if _follows_activations(key) else found.dtype
        sharding = first_device if shardings is None else shardings(key, leaf.shape)
        target[key] = jax.ShapeDtypeStruct(leaf.shape, leaf_dtype, sharding=sharding)
    if stored:
        raise ValueError(f"{path}: arrays that the configuration does not name: {', '.join(sorted(stored)[:5])}")
    arrays: dict[str, Array] = ocp.load(os.path.abspath(path), target)  # type: ignore[assignment]
    arrays |= {key: unpack_int4(arrays[key]) for key in _packed(skeleton)}
    model = jax.tree.unflatten(jax.tree.structure(skeleton), [arrays[key] for key, _ in named_arrays(skeleton)])
    with tempfile.TemporaryDirectory() as folder:
        for file, text in info.tokenizer.items():
            (Path(folder) / Path(file).name).write_text(text, encoding="utf-8")
        tokenizer = tokenizer_from_directory(Path(folder))
    return LoadedModel(model=model, config=info.config, tokenizer=tokenizer, name=info.name)


def inspect_checkpoint(path: str | Path) -> tuple[CheckpointInfo, dict[Component, int]]:
    """Read what a checkpoint is and the bytes of each component, without reading its arrays.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It is no checkpoint of this package, of a newer format, or files are missing or cut short.
    """
    info, stored = _read(Path(path))
    verify_manifest(Path(path), contents=False)
    return info, _sum_components(stored.items())


def is_checkpoint(path: str | Path) -> bool:
    """Say whether a directory holds a checkpoint of this package, of whatever format and state."""
    return (Path(path) / MANIFEST).is_file() and (Path(path) / "_CHECKPOINT_METADATA").is_file()


def component_bytes(model: Decoder) -> dict[Component, int]:
    """Count the bytes of a model by component, as a checkpoint stores them (embedding and head in bfloat16)."""
    return _sum_components(jax.eval_shape(_as_stored, model).items())


def named_arrays(tree: Any) -> list[tuple[str, Any]]:
    """Give the arrays of a model in the order of its leaves, named as in a checkpoint: `layers.qkv.weight.packed`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator=".").removesuffix(".value"), leaf) for p, leaf in leaves]


def _sum_components(arrays: Any) -> dict[Component, int]:
    totals: dict[Component, int] = {}
    for key, array in arrays:
        component = _component(key)
        size = jnp.dtype(array.dtype).itemsize
        for length in array.shape:
            size *= length
        totals[component] = totals.get(component, 0) + size
    return totals


def _component(key: str) -> Component:
    if key.startswith("compensators."):
        return "compensator gates" if ".gate." in key else "compensator factors"
    if key in ("embed", "head"):
        return "embedding" if key == "embed" else "head"
    if key.endswith(".weight.packed"):
        return "int4 codes"
    if key.endswith((".weight.scale", ".weight.zero")):
        return "int4 scales"
    return "biases" if key.endswith(".bias") else "norms"


def _follows_activations(key: str) -> bool:
    """Say whether an array has the type of the activations, rather than one of its own (norms and biases: float32)."""
    return _component(key) in ("embedding", "head")


def _as_stored(model: Decoder) -> dict[str, Array]:
    arrays = dict(named_arrays(model))
    arrays |= {key: arrays[key].astype(STORED_DTYPE) for key in ("embed", "head") if key in arrays}
    return arrays | {key: pack_int4(arrays[key]) for key in _packed(model)}


def _packed(model: Decoder) -> list[str]:
    """Name the arrays whose codes are stored two in a byte, and are not in memory."""
    banks = model.compensators.items()
    four = [module for module, bank in banks if isinstance(bank, CompensatorBank) and bank.bits == 4]
    return [f"compensators.{module}.{factor}" for module in four for factor in ("a", "bt")]


def _is_integer(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.integer)


def _linear_layout(model: Decoder, module: str) -> LinearLayout:
    if not isinstance(model.layers, Layer):
        raise ValueError("layers must be stacked to be saved: save the model before unstack()")
    weight = getattr(model.layers, module).weight
    if not isinstance(weight, QuantTensor):
        raise ValueError(f"{module} is not int4: quantize the model first, and save it before expand_model()")
    if weight.layout != "rows":
        raise ValueError(f"{module} is laid out for a GPU or a TPU: save the model before laying it out")
    return LinearLayout(groups=weight.scale.shape[-1], asymmetric=weight.zero is not None)


def _bank_layout(bank: CompensatorBank) -> BankLayout:
    gate = None
    if bank.gate is not None:
        fields = {field.name: getattr(bank.gate, field.name) for field in dataclasses.fields(bank.gate)}
        gate = {
            name: ArrayLayout(shape=value.shape, dtype=str(value.dtype))
            for name, value in fields.items()
            if isinstance(value, nnx.Variable)
        }
    form = "tanh" if bank.gate is None else bank.gate.form
    return BankLayout(ranks=bank.ranks, int8=bank.a_scale is not None, bits=bank.bits, gate=gate, gate_form=form)


def _skeleton(info: CheckpointInfo, *, source: str) -> Decoder:
    """Give the model that a checkpoint describes with shapes in place of arrays."""
    if missing := set(MODULES) - info.linears.keys():
        raise ValueError(f"{source}: damaged checkpoint: no layout for {', '.join(sorted(missing))}")

    def build() -> Decoder:
        config = info.config
        model = Decoder(config, {key: jnp.zeros(shape) for key, shape in weight_shapes(config).items()})
        for module, layout in info.linears.items():
            n, k = config.module_shapes()[module]
            scales = (config.num_layers, n, layout.groups)
            weight = QuantTensor(
                packed=jnp.zeros((config.num_layers, n, k // 2), jnp.int8),
                scale=jnp.zeros(scales),
                zero=jnp.zeros(scales, jnp.int8) if layout.asymmetric else None,
            )
            bias = getattr(model.layers, module).bias
            setattr(model.layers, module, Linear(weight, None if bias is None else bias[...]))
        banks = {module: _bank(layout, *config.module_shapes()[module]) for module, layout in info.compensators.items()}
        model.compensators = nnx.Dict(banks)
        return model

    return jax.eval_shape(build)


def _bank(layout: BankLayout, n: int, k: int) -> CompensatorBank:
    total = sum(layout.ranks)
    dtype = jnp.int8 if layout.int8 else jnp.float32
    scale = jnp.zeros(total) if layout.int8 else None
    gate = None
    if layout.gate is not None:
        arrays = {name: jnp.zeros(array.shape, array.dtype) for name, array in layout.gate.items()}
        gate = Gate(**arrays, form=layout.gate_form)
    return CompensatorBank(
        layout.ranks,
        jnp.zeros((total, k), dtype),
        jnp.zeros((total, n), dtype),
        a_scale=scale,
        bt_scale=scale,
        gate=gate,
        bits=layout.bits,
    )


def _read(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Give what the metadata say, and shape and dtype of each array on disk."""
    from orbax.checkpoint import v1 as ocp

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_dir() or (path / "config.json").exists() or not (path / MANIFEST).is_file():
        hugging_face = "a Hugging Face model" if (path / "config.json").exists() else f"it has no {MANIFEST}"
        raise ValueError(f"{path}: not a spear-jax checkpoint ({hugging_face if path.is_dir() else 'not a directory'})")
    try:
        found = ocp.metadata(os.path.abspath(path))
        values, stored = found.custom_metadata, dict(found.metadata)  # type: ignore[call-overload]
    except Exception as error:
        # Orbax fails in many ways on damaged metadata; the manifest tells which file it is.
        verify_manifest(path, contents=True)
        raise ValueError(f"{path}: not a spear-jax checkpoint ({type(error).__name__} from Orbax)") from error
    number = values.get("format") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(number, int):
        verify_manifest(path, contents=True)
        raise ValueError(f"{path}: not a spear-jax checkpoint (its metadata have no format number)")
    if number > FORMAT:
        writer = values.get("writer", "a newer version")
        raise ValueError(f"{path}: written in format {number} by {writer}; this version reads formats up to {FORMAT}")
    return parse_mapping(CheckpointInfo, values, source=str(path)), stored


def _tokenizer_files(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(file for file in Path(folder).iterdir() if file.suffix in (".json", ".jinja", ".txt"))
        return {file.name: file.read_text(encoding="utf-8") for file in files}
