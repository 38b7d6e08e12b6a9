"""The stages of a calibration up to trained compensators, each found again after a kill."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from calibrate.capture import Moments, all_hidden_states, choose_attend, second_moments
from calibrate.config import CalibrateConfig
from calibrate.damage import choose_ranks, module_damage
from calibrate.data import calibration_tokens, read_texts
from calibrate.imported import align, load_reference, with_imported_grid
from calibrate.initialize import whitened_svd
from calibrate.keys import stage_keys
from calibrate.latency import compensator_latency
from calibrate.local import train_locally
from calibrate.progress import Stages
from calibrate.quantizers import move_channel_scales, quantize_base
from calibrate.resumable import Trained, train_resumably
from calibrate.student import GateConfig, Params, Student, initial_compensators, zero_byte_params
from calibrate.train import TrainConfig, Trainer
from calibrate.weights import (
    as_stored,
    check_weights,
    dense_weights,
    float_weights,
    int4_weight,
    weight_errors,
    with_weights,
)
from calibrate.workdir import Key, WorkDirectory
from spear_jax import models
from spear_jax.checkpoint import inspect_checkpoint
from spear_jax.evaluate import WIKITEXT
from spear_jax.evaluation import load_examples
from spear_jax.evaluation.comparison import Overhead
from spear_jax.evaluation.tasks import find_task, load_hub_rows
from spear_jax.loading import CHECKPOINT, find_checkpoint
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import cast_model
from spear_jax.models.source import resolve
from spear_jax.quant import QuantTensor

_DENSE_SIDE = 256
"""Smaller side of a weight up to which its error is decomposed whole on a CPU."""


class Workshop:
    """One calibration; what stages share is made on demand, so that a finished stage need not make it."""

    def __init__(self, config: CalibrateConfig, *, stages: Stages) -> None:
        self.config, self.stages = config, stages
        self.notes: list[str] = []
        if find_checkpoint(config.model) is not None:
            raise ValueError(f"{config.model} is a checkpoint of a quantized model: name the model it was made from")
        source = resolve(config.model)
        self.config = config = with_imported_grid(config, source.path)
        self.output = config.output or Path("calibrated") / Path(source.name).name
        self.work = WorkDirectory(self.output / "work")
        self.on_cpu = jax.default_backend() == "cpu"
        dtype = ("float32" if self.on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
        self.dtype = jnp.dtype(dtype)
        paths = [source.path, *([] if config.reference is None else [resolve(config.reference).path])]
        self.keys = stage_keys(config, *paths, dtype=self.dtype.name)
        self._refuse_foreign_output()
        for name in config.tasks:
            find_task(name)
        self.examples = {
            name: load_examples(name, tasks_dir=config.tasks_dir, limit=config.task_limit) for name in config.tasks
        }
        self.user_texts: list[str] = []
        if self.work.load("text", self.keys["text"]) is None:
            self.user_texts = [text for name in config.text for text in read_texts(name)]
        eval_texts = self._read_eval_texts()
        with stages.stage("load"):
            self.loaded = models.load(config.model, dtype="float32")
            self.exact = self.loaded.model
            check_weights(self.exact, source=config.model)
            self.aligned = None
            if config.reference is not None:
                self.exact = load_reference(config.reference, self.loaded.model)
                check_weights(self.exact, source=config.reference)
                self.aligned = align(self.exact, self.loaded.model, source=config.reference)
            self.reference = cast_model(self.exact, self.dtype)
        limit = self.exact.config.max_position
        for name in ("length", "eval_window"):
            if getattr(config, name) > limit:
                raise ValueError(f"{name} {getattr(config, name)}: the model has {limit} positions")
        self.eval_tokens = {name: self._encode(text) for name, text in eval_texts.items()}
        for name, tokens in self.eval_tokens.items():
            if len(tokens) < config.eval_window:
                raise ValueError(f"{name}: {len(tokens)} tokens, fewer than one window of {config.eval_window}")
        self.attend = choose_attend(self.reference, config.length)

    @property
    def final_key(self) -> Key:
        """The key of what the checkpoint holds."""
        return self.keys["train" if self.config.budget else "zero-byte"]

    def _refuse_foreign_output(self) -> None:
        place = self.output / CHECKPOINT
        if self.config.overwrite or not place.exists():
            return
        try:
            found = inspect_checkpoint(place)[0].details.get("key")
        except ValueError:
            found = None
        if found != self.final_key.digest:
            raise FileExistsError(
                f"{place} was made with other settings: give another --output, or --overwrite to replace it"
            )

    def _read_eval_texts(self) -> dict[str, str]:
        texts = {}
        for path in self.config.eval_text:
            try:
                texts[path.name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text: {error}") from None
            if not texts[path.name].strip():
                raise ValueError(f"{path}: the text is empty")
        if self.config.eval_text or self.config.tasks:
            return texts
        try:
            rows = load_hub_rows(*WIKITEXT, instead="--eval-text FILE")
            return {"WikiText-2 test": "\n\n".join(rows["text"])}
        except ValueError as error:
            self.note(f"{error}; perplexity is measured on held-out calibration text only")
            return {}

    def note(self, text: str) -> None:
        """Print a remark, and keep it for the report."""
        self.notes.append(text[0].upper() + text[1:] + ("" if text.endswith(".") else "."))
        self.stages.say(f"note: {text}")

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Calibration sequences."""
        saved = self.work.load("text", self.keys["text"])
        if saved is not None:
            self.stages.resumed("text", saved.values["seconds"])
            return saved.arrays["tokens"]
        config, key = self.config, jax.random.key(self.config.seed)
        with self.stages.stage("text") as report:
            tokens, _ = calibration_tokens(
                self.reference,
                self.user_texts,
                lambda text: self._encode(text).tolist(),
                count=config.sequences,
                length=config.length,
                text_share=config.text_share,
                longest_prompt=config.prompt_length,
                bos_share=config.bos_share,
                key=key,
                progress=report,
            )
        self.work.save("text", self.keys["text"], {"tokens": tokens}, seconds=self.stages.seconds["text"])
        return tokens

    @functools.cached_property
    def moments(self) -> Moments:
        """Second moments of the inputs of every linear; too large to keep, and quick to make."""
        tokens = self.tokens[: self.config.moment_sequences]
        with self.stages.stage("moments"):
            size = min(self.config.batch_size, len(tokens))
            return jax.block_until_ready(second_moments(self.reference, tokens, batch_size=size, attend=self.attend))

    @functools.cached_property
    def target(self) -> Array:
        """The reference's last hidden states of all calibration sequences."""
        tokens = self.tokens
        with self.stages.stage("reference states"):
            return jax.block_until_ready(
                all_hidden_states(self.reference, tokens, batch_size=self.config.batch_size, attend=self.attend)
            )

    @functools.cached_property
    def _behind_channel_scales(self) -> tuple[Decoder, Moments]:
        moments = self.moments
        if self.aligned is not None:
            return self.aligned.model, self.aligned.moments(moments)
        with self.stages.stage("channel scales"):
            return move_channel_scales(self.exact, moments, self.config.spec)

    @property
    def rounded_from(self) -> Decoder:
        """The float model that the base was rounded from: with AWQ, or imported, the one behind channel scales."""
        if self.aligned is not None:
            return self.aligned.model
        return self._behind_channel_scales[0] if self.config.quantizer == "awq" else self.exact

    @property
    def rounded_moments(self) -> Moments:
        """The second moments of the inputs of what the base was rounded from."""
        return self._behind_channel_scales[1] if self.config.quantizer in ("awq", "imported") else self.moments

    @functools.cached_property
    def quantized(self) -> Decoder:
        """The int4 base as the quantizer gives it, or as imported, with embedding and head as they are stored."""
        if self.config.quantizer == "imported":
            return as_stored(cast_model(self.loaded.model, self.dtype))
        saved = self.work.load("quantize", self.keys["quantize"])
        stored = as_stored(self.reference)
        if saved is not None:
            self.stages.resumed("quantize", saved.values["seconds"])
            base = stored
            if self.config.quantizer == "awq":
                base = stored.replace(layers=jax.tree.map(lambda leaf: leaf, stored.layers))
                for name in ("input_norm", "mlp_norm"):
                    getattr(base.layers, name).weight = nnx.Param(jnp.asarray(saved.arrays[f"{name}"]))
            weights = {name: _saved_weight(saved.arrays, name) for name in MODULES}
            return base.replace(layers=with_weights(base.layers, weights))
        moments = None if self.config.quantizer == "rtn" else self.moments
        with self.stages.stage("quantize") as report:
            base = quantize_base(
                self.exact,
                quantizer=self.config.quantizer,
                spec=self.config.spec,
                moments=moments or {},
                progress=report,
            )
            if self.config.quantizer == "awq":
                self._behind_channel_scales = base.exact, base.moments
            model = as_stored(cast_model(base.model, self.dtype))
            jax.block_until_ready(model)
        arrays: dict[str, Any] = {name: int4_weight(model, name) for name in MODULES}
        for name in ("input_norm", "mlp_norm"):
            arrays[name] = getattr(model.layers, name).weight[...]
        self.work.save("quantize", self.keys["quantize"], arrays, seconds=self.stages.seconds["quantize"])
        return model

    @functools.cached_property
    def zero_byte(self) -> Trained | None:
        """What was trained before compensators; None where nothing was."""
        config = self.config
        if not config.zero_byte:
            return None
        student = Student(ranks={}, gate=GateConfig(form="static"))
        params = zero_byte_params(self.quantized, self.rounded_from, config.zero_byte)
        return self._train(
            "train zero-byte", self.keys["zero-byte"], self.quantized, student, params, config.zero_config
        )

    @functools.cached_property
    def base(self) -> Decoder:
        """The model that compensators are put on."""
        if self.zero_byte is None:
            return self.quantized
        student = Student(ranks={}, gate=GateConfig(form="static"))
        return student.finish(self.quantized, self.zero_byte.params, exact=self.rounded_from)

    @functools.cached_property
    def dense(self) -> dict[str, Array]:
        """The base's int4 weights written out."""
        return dense_weights(self.base)

    @functools.cached_property
    def damage(self) -> np.ndarray | None:
        """`1 - CKA` of each layer and module alone; None where it is not measured."""
        config = self.config
        if not config.damage_sequences or not config.budget:
            return None
        saved = self.work.load("diagnose", self.keys["damage"])
        if saved is not None:
            self.stages.resumed("diagnose", saved.values["seconds"])
            return saved.arrays["damage"]
        tokens, dense = self.tokens[: config.damage_sequences], self.dense
        # Weights behind channel scales belong to what feeds them: the reference's function, in the base's scales.
        moved = config.quantizer in ("awq", "imported")
        reference = cast_model(self.rounded_from, self.dtype) if moved else self.reference
        with self.stages.stage("diagnose") as report:
            size = min(config.batch_size, len(tokens))
            damage = module_damage(reference, dense, tokens, batch_size=size, attend=self.attend, progress=report)
        self.work.save("diagnose", self.keys["damage"], {"damage": damage}, seconds=self.stages.seconds["diagnose"])
        return damage

    @functools.cached_property
    def latency(self) -> np.ndarray | None:
        """Seconds that a compensator adds to each module; None where placement does not ask."""
        if not self.config.latency_aware:
            return None
        saved = self.work.load("latency", self.keys["damage"])
        if saved is not None:
            self.stages.resumed("latency", saved.values["seconds"])
            return saved.arrays["latency"]
        base = self.base
        with self.stages.stage("latency"):
            latency = compensator_latency(base)
        # Kept, as another measurement would place other ranks.
        self.work.save("latency", self.keys["damage"], {"latency": latency}, seconds=self.stages.seconds["latency"])
        return latency

    def initial(self, gate: GateConfig, key: Key) -> tuple[dict[str, tuple[int, ...]], Params]:
        """Place ranks and give the parameters that training starts from."""
        config = self.config
        stage = "place and initialise" if key == self.keys["initial"] else "place and initialise static"
        saved = self.work.load(stage, key)
        if saved is not None:
            self.stages.resumed(stage, saved.values["seconds"])
            return {name: tuple(ranks) for name, ranks in saved.values["ranks"].items()}, _nested(saved.arrays)
        damage, exact, moments, dense = self.damage, self.rounded_from, self.rounded_moments, self.dense
        latency = self.latency
        with self.stages.stage(stage):
            errors = weight_errors(exact, dense)
            probes = 0 if gate.form == "static" else gate.probes
            low_ranks = {
                name: whitened_svd(
                    error,
                    moments[name],
                    rank=min(config.max_rank + probes, *error.shape[1:]),
                    # The whole spectrum of a layer takes a CPU seconds, the leading part a tenth of that.
                    dense=False if self.on_cpu and min(error.shape[1:]) > _DENSE_SIDE else None,
                )
                for name, error in errors.items()
            }
            budget = int(config.budget * Overhead.of(self.base).model)
            ranks, _, _ = choose_ranks(
                errors,
                moments,
                damage if config.placement in ("cka", "gain") else None,
                budget=budget,
                strategy=config.placement,
                gate=gate,
                max_rank=config.max_rank,
                seed=config.seed,
                flatten=config.flatten,
                bits=config.factor_bits,
                low_ranks=low_ranks,
                latency=latency,
            )
            key_of_gates = jax.random.key(config.seed)
            params = initial_compensators(errors, moments, ranks, gate, key=key_of_gates, low_ranks=low_ranks)
            params |= zero_byte_params(self.base, exact, config.joint)
            params = jax.block_until_ready(params)
        self.work.save(stage, key, params, ranks=ranks, seconds=self.stages.seconds[stage])
        return ranks, params

    def _locally(self, student: Student, params: Params, key: Key) -> Params:
        """Train factors against the errors of their own modules, where steps are given for that."""
        if not self.config.local_steps:
            return params
        saved = self.work.load("train locally", key)
        if saved is not None:
            self.stages.resumed("train locally", saved.values["seconds"])
            return saved.tree(params)
        errors, moments = weight_errors(self.rounded_from, self.dense), self.rounded_moments
        begin = self.stages.seconds.get("train locally", 0.0)
        with self.stages.stage("train locally") as report:
            steps = self.config.local_steps
            params = train_locally(errors, moments, student, params, steps=steps, progress=report)
        self.work.save("train locally", key, params, seconds=self.stages.seconds["train locally"] - begin)
        return params

    def compensated(self, gate: GateConfig, *, twin: bool = False) -> tuple[Decoder, Trained]:
        """Train compensators with a gate, locally and then end to end; give the model as stored."""
        keys = {name: self.keys[f"static {name}" if twin else name] for name in ("initial", "local", "train")}
        ranks, params = self.initial(gate, keys["initial"])
        student = Student(ranks=ranks, gate=gate, bits=self.config.factor_bits)
        params = self._locally(student, params, keys["local"])
        stage = "train static" if twin else "train"
        trained = self._train(stage, keys["train"], self.base, student, params, self.config.train_config)
        exact = self.rounded_from if "ranges" in self.config.joint else None
        return student.finish(self.base, trained.params, exact=exact), trained

    def _train(
        self, stage: str, key: Key, base: Decoder, student: Student, params: Params, config: TrainConfig
    ) -> Trained:
        def trainer() -> Trainer:
            dense = float_weights(self.rounded_from, self.dtype) if "ranges" in params else None
            return Trainer(self.reference, base, student, self.tokens, config, target=self.target, dense=dense)

        return train_resumably(stage, params, trainer, work=self.work, key=key, stages=self.stages)


def _saved_weight(arrays: dict[str, np.ndarray], name: str) -> QuantTensor:
    packed, scale, zero = (arrays.get(f"{name}.{field}") for field in ("packed", "scale", "zero"))
    return QuantTensor(
        packed=jnp.asarray(packed), scale=jnp.asarray(scale), zero=None if zero is None else jnp.asarray(zero)
    )


def _nested(arrays: dict[str, np.ndarray]) -> Params:
    """Give parameters back their groups from names with dots."""
    params: Params = {}
    for name, array in arrays.items():
        *groups, last = name.split(".")
        place = params
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = jnp.asarray(array)
    return params
