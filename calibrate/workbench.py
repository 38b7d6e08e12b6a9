"""What the arms of an ablation share, made once: the model, its text, second moments, bases and their damage."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calibrate.arms import AblateConfig, Arm
from calibrate.capture import all_hidden_states, choose_attend, second_moments
from calibrate.damage import choose_ranks, module_damage
from calibrate.data import calibration_tokens, read_texts
from calibrate.initialize import LowRank, whitened_svd
from calibrate.local import train_locally
from calibrate.measure import task_accuracies
from calibrate.quantizers import Base, quantize_base
from calibrate.recover import save_params
from calibrate.student import GateConfig, Params, Student, initial_compensators, zero_byte_params
from calibrate.train import Standing, TrainConfig, Trainer, TrainingDiverged
from calibrate.weights import dense_weights, float_weights, weight_errors
from spear_jax import models
from spear_jax.evaluation import load_examples, perplexity
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import cast_model, expand_model, weight_bytes
from spear_jax.quant import QuantSpec


class Workbench:
    """A loaded model with everything that arms share, made once and on demand."""

    def __init__(self, config: AblateConfig) -> None:
        self.config = config
        self.marks: dict[str, float] = {}
        with self.timed("load"):
            loaded = models.load(config.model, dtype="float32")
            self.loaded = loaded
            exact = truncate(loaded.model, config.layers) if config.layers else loaded.model
            self.exact = exact
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
            self.reference = cast_model(exact, dtype)
        self.spec = QuantSpec(group_size=config.group_size, symmetric=not config.asymmetric)
        self.bos_id = loaded_bos(loaded) if config.bos else None
        self.texts = {path.name: self._encode(path.read_text(encoding="utf-8")) for path in config.text}
        self.examples = {
            name: load_examples(name, tasks_dir=config.tasks_dir, limit=config.task_limit) for name in config.tasks
        }
        with self.timed("calibration text"):
            self.tokens, self.is_sampled = self._calibration_tokens()
        self.attend = choose_attend(self.reference, self.tokens.shape[1])
        with self.timed("moments"):
            self.moments = second_moments(
                self.reference, self.tokens[: config.moment_sequences], batch_size=config.batch_size, attend=self.attend
            )
            jax.block_until_ready(self.moments)
        with self.timed("reference states"):
            self.target = jax.block_until_ready(
                all_hidden_states(self.reference, self.tokens, batch_size=config.batch_size, attend=self.attend)
            )
        with self.timed("reference perplexity"):
            self.reference_scores = self.perplexities(self.reference)
        self.reference_accuracies = self.accuracies(self.reference)
        self._bases: dict[Any, tuple[Base, dict[str, Any]]] = {}
        self._damage: dict[Any, np.ndarray] = {}
        self._low_ranks: dict[Any, dict[str, LowRank]] = {}
        self._pools: dict[str, tuple[np.ndarray, jax.Array]] = {"all": (self.tokens, self.target)}

    def timed(self, name: str) -> "Stopwatch":
        """Time a stage and say so on stderr."""
        return Stopwatch(name, self.marks)

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def _calibration_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        name = "-".join(
            str(part)
            for part in (
                self.loaded.name, config.layers, config.sequences, config.length, Path(config.source).name,
                config.text_share, config.prompt_length, config.bos_share, config.seed,
            )
        )  # fmt: skip
        path = None if config.cache is None else config.cache / f"{name}.npz"
        if path is not None and path.exists():
            saved = np.load(path)
            return saved["tokens"], saved["sampled"]
        tokens, sampled = calibration_tokens(
            self.reference,
            read_texts(config.source) if config.source else [],
            lambda text: self._encode(text).tolist(),
            count=config.sequences,
            length=config.length,
            text_share=config.text_share,
            longest_prompt=config.prompt_length,
            bos_share=config.bos_share,
            key=jax.random.key(config.seed),
        )
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, tokens=tokens, sampled=sampled)
        return tokens, sampled

    def perplexities(self, dense: Decoder) -> dict[str, float]:
        """Measure the perplexity of a model, whose weights are written out, on every text."""
        config = self.config
        return {
            name: perplexity(
                dense,
                tokens,
                window=config.window,
                bos_id=self.bos_id,
                max_windows=config.windows,
                batch_size=config.batch_size,
            ).value
            for name, tokens in self.texts.items()
        }

    def accuracies(self, dense: Decoder) -> dict[str, float]:
        """Measure the accuracy of such a model on every task."""
        if not self.examples:
            return {}
        with self.timed("tasks"):
            return task_accuracies(
                dense,
                self.loaded.tokenizer,
                self.examples,
                max_length=self.exact.config.max_position,
                bos_id=self.bos_id,
                batch_size=self.config.batch_size,
            )

    def scores(self, model: Decoder) -> dict[str, dict[str, float]]:
        """Measure both, of a model as stored."""
        dense = expand_model(model, self.reference.dtype)
        return {"perplexity": self.perplexities(dense), "tasks": self.accuracies(dense)}

    def base(self, arm: Arm) -> tuple[Base, dict[str, Any]]:
        """Give the base of an arm, with what it scores: quantized, then trained without added bytes."""
        key: Any = (arm.base, self.spec)
        if key not in self._bases:
            with self.timed(f"quantize {arm.base}"):
                base = quantize_base(self.exact, quantizer=arm.base, spec=self.spec, moments=self.moments)
                base = dataclasses.replace(base, model=cast_model(base.model, self.reference.dtype))
                jax.block_until_ready(base.model)
            self._bases[key] = base, self.scores(base.model)
        if not arm.zero:
            return self._bases[key]
        zero_key = (key, arm.zero, arm.zero_train, arm.pool)
        if zero_key not in self._bases:
            base, _ = self._bases[key]
            student = Student(ranks={}, gate=GateConfig(form="static"))
            params = zero_byte_params(base.model, base.exact, tuple(arm.zero.split("+")))
            params, curve = self.train(base, student, params, arm.zero_train, arm.pool, label=f"{arm.base} {arm.zero}")
            base = dataclasses.replace(base, model=student.finish(base.model, params, exact=base.exact))
            self._bases[zero_key] = base, self.scores(base.model) | {"curve": curve}
        return self._bases[zero_key]

    def _pool(self, name: str) -> tuple[np.ndarray, jax.Array]:
        if name not in self._pools:
            self._pools[name] = self.tokens[self.is_sampled], self.target[jnp.asarray(np.flatnonzero(self.is_sampled))]
        return self._pools[name]

    def train(
        self, base: Base, student: Student, params: Params, config: TrainConfig, pool: str, *, label: str
    ) -> tuple[Params, list[dict[str, float]]]:
        """Train parameters, printing each evaluation."""
        tokens, target = self._pool(pool)
        dense = float_weights(base.exact) if "ranges" in params else None
        trainer = Trainer(self.reference, base.model, student, tokens, config, target=target, dense=dense)

        def show(standing: Standing) -> None:
            point, pace = standing.curve[-1], ""
            if point.step:
                before = standing.curve[-2]
                pace = f", {1000 * (point.seconds - before.seconds) / (point.step - before.step):.1f} ms/step"
            log(
                f"  {label}: step {point.step} loss {point.loss:.4f} held-out KL {point.held_out_kl:.4f}"
                f" hidden {point.held_out_hidden:.4f}{pace}"
            )

        try:
            end = trainer.run(params, on_point=show)
        except TrainingDiverged as error:
            log(f"  {label}: {error}")
            return error.params, []
        return end.best, [dataclasses.asdict(point) for point in end.curve]

    def damage(self, key: Any, base: Base, dense: dict[str, jax.Array]) -> np.ndarray:
        """Measure the damage of each module of a base, once; `dense` are its int4 weights written out."""
        if key not in self._damage:
            with self.timed("damage"):
                tokens = self.tokens[: self.config.damage_sequences]
                # AWQ's weights belong to what feeds them: the reference's function behind channel scales.
                reference = cast_model(base.exact, self.reference.dtype)
                self._damage[key] = module_damage(
                    reference, dense, tokens, batch_size=self.config.batch_size, attend=self.attend
                )
        return self._damage[key]

    def run(self, arm: Arm) -> dict[str, Any]:
        """Run an arm; give its results as plain data."""
        begin = time.perf_counter()
        base, base_result = self.base(arm)
        plain = self._bases[(arm.base, self.spec)][1]["perplexity"]
        rtn = self.base(Arm())[1]
        w4_bytes = weight_bytes(base.model)
        result: dict[str, Any] = {
            "arm": dataclasses.asdict(arm),
            "w4_bytes": w4_bytes,
            "reference": self.reference_scores,
            "rtn": rtn["perplexity"],
            "quantized": plain,
            "base": base_result["perplexity"],
        }
        if arm.zero:
            result["zero_curve"] = base_result["curve"]
        own = base_result
        if arm.compensate:
            model, details = self._compensate(arm, base, w4_bytes)
            result |= details
            own = self.scores(model)
        result["perplexity"] = own["perplexity"]
        if own["tasks"]:
            result["tasks"] = {"reference": self.reference_accuracies, "rtn": rtn["tasks"], "arm": own["tasks"]}
        result["recovered_of_rtn"] = self._recovered(result["perplexity"], rtn["perplexity"])
        result["recovered_of_base"] = self._recovered(result["perplexity"], base_result["perplexity"])
        result["seconds"] = time.perf_counter() - begin
        return result

    def _recovered(self, scores: dict[str, float], worst: dict[str, float]) -> dict[str, float]:
        gaps = {name: worst[name] - reference for name, reference in self.reference_scores.items()}
        return {name: (worst[name] - scores[name]) / gap if gap else 0.0 for name, gap in gaps.items()}

    def _compensate(self, arm: Arm, start: Base, w4_bytes: int) -> tuple[Decoder, dict[str, Any]]:
        base, moments = start.model, start.moments
        dense = dense_weights(base)
        errors = weight_errors(start.exact, dense)
        damage, base_key = None, (arm.base, *((arm.zero, arm.zero_train, arm.pool) if arm.zero else ()))
        if arm.placement in ("cka", "gain"):
            damage = self.damage(base_key, start, dense)
        if base_key not in self._low_ranks:
            with self.timed("whitened errors"):
                self._low_ranks[base_key] = jax.block_until_ready(
                    {name: whitened_svd(errors[name], moments[name], rank=self.config.spectrum) for name in errors}
                )
        low_ranks = self._low_ranks[base_key]
        budget = int(arm.budget * w4_bytes)
        ranks, _, diagnosis = choose_ranks(
            errors, moments, damage, budget=budget, strategy=arm.placement, gate=arm.gate, max_rank=arm.max_rank,
            seed=arm.seed, flatten=arm.flatten, bits=arm.bits, low_ranks=low_ranks,
        )  # fmt: skip
        student = Student(ranks=ranks, gate=arm.gate, int8=arm.int8, bits=arm.bits)
        key = jax.random.key(arm.seed)
        params = initial_compensators(errors, moments, ranks, arm.gate, key=key, low_ranks=low_ranks)
        if arm.local_steps:
            with self.timed("local training"):
                params = train_locally(errors, moments, student, params, steps=arm.local_steps)
        del errors
        initial = None
        if self.config.initial:
            initial = self.perplexities(expand_model(student.finish(base, params), self.reference.dtype))
            log(f"  {arm.name}: whitened SVD {initial}")
        if arm.joint:
            params |= zero_byte_params(base, start.exact, tuple(arm.joint.split("+")))
        config = dataclasses.replace(arm.train, seed=arm.seed)
        params, curve = self.train(start, student, params, config, arm.pool, label=arm.name)
        model = student.finish(base, params, exact=start.exact)
        if self.config.save is not None:
            save_params(self.config.save / f"{arm.name}.npz", params, ranks, model)
        nbytes = sum(bank.nbytes for bank in model.compensators.values())
        linears = weight_bytes({name: getattr(base.layers, name).weight for name in ranks})
        return model, {
            "initial": initial,
            "ranks": ranks,
            "coverage": None if diagnosis is None else diagnosis.coverage,
            "damage": None if damage is None else damage.tolist(),
            "compensator_bytes": nbytes,
            "overhead_of_model": nbytes / w4_bytes,
            "overhead_of_linears": nbytes / linears,
            "curve": curve,
        }


class Stopwatch:
    """Times a block and prints it."""

    def __init__(self, name: str, marks: dict[str, float]) -> None:
        self.name, self.marks = name, marks

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.marks[self.name] = time.perf_counter() - self.begin
        log(f"{self.name}: {self.marks[self.name]:.1f} s")


def log(message: str) -> None:
    """Print a line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def loaded_bos(loaded: Any) -> int:
    """Give a model's BOS token.

    Raises:
        ValueError: It has none.
    """
    if loaded.config.bos_id is None:
        raise ValueError(f"--bos: {loaded.name} has no BOS token")
    return loaded.config.bos_id


def truncate(model: Decoder, layers: int) -> Decoder:
    """Give a model of the first layers only."""
    if not 1 <= layers <= model.config.num_layers:
        raise ValueError(f"cannot keep {layers} of {model.config.num_layers} layers")
    shared = model.config.layer_is_global
    config = dataclasses.replace(
        model.config, num_layers=layers, layer_is_global=None if shared is None else shared[:layers]
    )
    kept = jax.tree.map(lambda leaf: leaf[:layers], model.layers)
    kept.config = config
    return model.replace(layers=kept, config=config)
