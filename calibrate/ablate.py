"""Compare variants of a calibration on one model: loads, samples and captures once, then runs arm after arm.

python -m calibrate.ablate --model demo --text wikitext2_test.txt --preset gates --output calibrate/results/gates.json
"""

import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from calibrate.capture import all_hidden_states, choose_attend, second_moments
from calibrate.damage import Strategy, choose_ranks, module_damage
from calibrate.data import calibration_tokens, read_texts
from calibrate.initialize import LowRank, whitened_svd
from calibrate.quantizers import Base, Quantizer, float_weight, quantize_base, weight_errors
from calibrate.student import GateConfig, Params, Student, initial_compensators, zero_byte_params
from calibrate.train import CurvePoint, TrainConfig, Trainer, TrainingDiverged, TrainState, dense_weights
from spear_jax.cli import parse_flags, run_main
from spear_jax.evaluation import load_examples, perplexity, run_task
from spear_jax.models.decoder import MODULES, Decoder
from spear_jax.models.quantize import cast_model, expand_model, weight_bytes
from spear_jax.quant import QuantSpec
from spear_jax.versions import package_versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant: a base, what is trained on it without bytes, then compensators and how they are trained.

    `zero` and `joint` list groups of zero-byte parameters joined by "+" ("scales+norms+codes"): those of `zero` are
    trained before there are compensators, those of `joint` along with them. `pool` is the text to train on: all of it,
    or only what was sampled from the model. `bits` below eight only tries what factors of fewer bits would be worth.
    """

    name: str = "arm"
    base: Quantizer = "rtn"
    zero: str = ""
    zero_train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    compensate: bool = True
    joint: str = ""
    budget: float = 0.01
    placement: Strategy = "uniform"
    flatten: float = 1.0
    max_rank: int = 16
    gate: GateConfig = dataclasses.field(default_factory=lambda: GateConfig(form="static"))
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    int8: bool = True
    bits: int = 8
    pool: Literal["all", "sampled"] = "all"
    seed: int = 0


def parse_arm(text: str, common: tuple[str, ...] = ()) -> Arm:
    """Read "name:key=value,key=value"; keys of nested settings have dots ("train.steps"); `common` comes first.

    Raises:
        ValueError: A key is unknown or a value has the wrong type.
    """
    name, _, body = text.partition(":")
    arm = Arm(name=name)
    for item in (*common, *body.split(",")):
        if item:
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"arm {name}: expected key=value, got {item!r}")
            arm = _assign(arm, key.strip().split("."), value.strip(), where=f"arm {name}: {key}")
    return arm


def _assign(target: Any, path: list[str], value: str, *, where: str) -> Any:
    head, *rest = path
    known = {field.name for field in dataclasses.fields(target)}
    if head not in known:
        raise ValueError(f"{where}: unknown; known: {', '.join(sorted(known))}")
    old = getattr(target, head)
    if rest:
        return dataclasses.replace(target, **{head: _assign(old, rest, value, where=where)})
    try:
        match old:
            case bool():
                new: Any = {"true": True, "false": False, "1": True, "0": False}[value.lower()]
            case int() | float() | str():
                new = type(old)(float(value)) if isinstance(old, int) else type(old)(value)
            case _:
                raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"{where}: expected a {type(old).__name__}, got {value!r}") from None
    return dataclasses.replace(target, **{head: new})


PRESETS: dict[str, tuple[str, ...]] = {
    "quick-gpu": (
        "rtn:compensate=0",
        "clip:base=clip,compensate=0",
        "gptq-clip:base=gptq-clip,compensate=0",
        "refined:base=refined,compensate=0",
        "static:",
        "static-hot:train.factor_rate=3e-2",
        "static-cool:train.factor_rate=3e-3",
        "shift-rms:gate.form=shift,gate.rms=1,gate.hidden=8",
        "refined-scales-ec:base=refined,zero=scales+norms",
        "refined-codes:base=refined,zero=scales+norms+codes,compensate=0",
        "published:gate.form=published",
        "static-gain-flat:placement=gain,flatten=0.5",
    ),
    "better": (
        "long:train.steps=2000",
        "long-kl:train.steps=2000,train.hidden_weight=0.1",
        "cka:placement=cka",
        "linear-rms:gate.form=linear,gate.rms=1,gate.hidden=8",
        "shift-probe:gate.form=shift,gate.rms=1,gate.hidden=8,gate.probes=1",
        "linear-probe:gate.form=linear,gate.rms=1,gate.hidden=8,gate.probes=1",
    ),
    "zero": (
        "rtn-scales:zero=scales+norms,compensate=0",
        "refined-scales:base=refined,zero=scales+norms,compensate=0",
        "refined-codes:base=refined,zero=scales+norms+codes,compensate=0",
        "refined-codes-hot:base=refined,zero=scales+norms+codes,compensate=0,zero_train.code_rate=1e-2",
        "refined-scales-ec:base=refined,zero=scales+norms",
        "refined-scales-ec-joint:base=refined,zero=scales+norms,joint=scales+norms",
        "refined-codes-ec:base=refined,zero=scales+norms+codes",
    ),
    "bases": tuple(
        f"{base}:base={base},compensate=0"
        for base in ("rtn", "awq", "clip", "learned-clip", "gptq", "gptq-clip", "refined")
    ),
    "gates": tuple(
        f"{form}-{seed}:gate.form={form},seed={seed}" for seed in range(3) for form in ("static", "published", "shift")
    ),
    "placement": tuple(
        f"{how}-{seed}:placement={how},seed={seed}" for seed in range(3) for how in ("uniform", "cka", "random")
    ),
}
"""Sets of arms by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Run variants of a calibration on one model and print each one's perplexity, bytes and recovered share."""

    model: str = "demo"
    """`demo`, a Hugging Face directory, a GGUF file, or a hub id."""

    text: tuple[Path, ...] = ()
    """Text files to measure perplexity on; the first is the main one."""

    windows: int | None = None
    """Measure the first windows of each text only."""

    window: int = 1024
    """Tokens in a window of evaluation."""

    bos: bool = False
    """Begin windows with BOS."""

    preset: str = ""
    """Set of arms: quick-gpu, better, zero, bases, gates, placement."""

    arms: tuple[str, ...] = ()
    """Arms as "name:key=value,key=value", run after those of the preset."""

    common: tuple[str, ...] = ()
    """Settings "key=value" of all arms."""

    sequences: int = 2048
    """Calibration sequences."""

    length: int = 512
    """Tokens in a calibration sequence."""

    source: str = ""
    """Calibration text: a text or jsonl file or a dataset's id; empty: sampled from the model itself."""

    text_share: float = 1.0
    """Share of sequences cut from `source`; the rest is sampled."""

    prompt_length: int = 64
    """Sampled sequences go on from up to this many tokens of `source`; 0: from BOS or any token."""

    bos_share: float = 0.5
    """Share of sampled sequences that begin with BOS."""

    moment_sequences: int = 128
    """Sequences that second moments are measured on."""

    spectrum: int = 24
    """Highest rank that whitened errors are decomposed to, for `max_rank` and the probes of gates."""

    initial: bool = False
    """Measure the perplexity of compensators as initialised, too."""

    damage_sequences: int = 16
    """Sequences that module damage is measured on."""

    batch_size: int = 16
    """Sequences or windows run at a time outside training."""

    layers: int = 0
    """Keep the first layers of the model only, for a trial; 0 keeps all."""

    tasks: tuple[str, ...] = ()
    """Zero-shot tasks to measure: lambada, hellaswag, arc_easy, piqa, winogrande."""

    tasks_dir: Path | None = None
    """Folder with the tasks' files. Without it: from the dataset hub."""

    task_limit: int | None = None
    """Score the first examples of each task only."""

    group_size: int = -1
    """Columns that share a scale; -1: one scale a row."""

    asymmetric: bool = False
    """Quantize with zero points."""

    seed: int = 0
    """Seed of the calibration text."""

    cache: Path | None = None
    """Folder to keep sampled text in."""

    output: Path | None = None
    """JSON file of results, written after every arm."""

    save: Path | None = None
    """Folder to write each arm's trained parameters to, as NAME.npz."""


class Workbench:
    """A loaded model with everything that arms share, made once and on demand."""

    def __init__(self, config: AblateConfig) -> None:
        from spear_jax import models

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
            self.reference_scores = self.scores(self.reference)
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

    def scores(self, model: Decoder) -> dict[str, float]:
        """Measure the perplexity of a model on every text."""
        config = self.config
        bos = loaded_bos(self.loaded) if config.bos else None
        dense = expand_model(model, self.reference.dtype)
        return {
            name: perplexity(
                dense,
                tokens,
                window=config.window,
                bos_id=bos,
                max_windows=config.windows,
                batch_size=config.batch_size,
            ).value
            for name, tokens in self.texts.items()
        }

    def accuracies(self, model: Decoder) -> dict[str, float]:
        """Measure the accuracy of a model on every task."""
        if not self.examples:
            return {}
        dense, found = expand_model(model, self.reference.dtype), {}
        with self.timed("tasks"):
            for task, examples in self.examples.items():
                scored = run_task(
                    dense,
                    self.loaded.tokenizer,
                    task,
                    examples,
                    max_length=self.exact.config.max_position,
                    bos_id=loaded_bos(self.loaded) if self.config.bos else None,
                    batch_tokens=1024 * self.config.batch_size,
                )
                found[task] = scored.metrics["acc"]
        return found

    def base(self, arm: Arm) -> tuple[Base, dict[str, Any]]:
        """Give the base of an arm, with what it scores: quantized, then trained without added bytes."""
        key: Any = (arm.base, self.spec)
        if key not in self._bases:
            with self.timed(f"quantize {arm.base}"):
                base = quantize_base(self.exact, quantizer=arm.base, spec=self.spec, moments=self.moments)
                base = dataclasses.replace(base, model=cast_model(base.model, self.reference.dtype))
                jax.block_until_ready(base.model)
            self._bases[key] = base, {"perplexity": self.scores(base.model), "tasks": self.accuracies(base.model)}
        if not arm.zero:
            return self._bases[key]
        zero_key = (key, arm.zero, arm.zero_train, arm.pool)
        if zero_key not in self._bases:
            base, _ = self._bases[key]
            student = Student(ranks={}, gate=GateConfig(form="static"))
            params = zero_byte_params(base.model, base.exact, tuple(arm.zero.split("+")))
            params, curve = self.train(base, student, params, arm.zero_train, arm.pool, label=f"{arm.base} {arm.zero}")
            base = dataclasses.replace(base, model=student.finish(base.model, params, exact=base.exact))
            self._bases[zero_key] = (
                base,
                {"perplexity": self.scores(base.model), "tasks": self.accuracies(base.model), "curve": curve},
            )
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
        dense = None
        if "ranges" in params:
            dense = {name: float_weight(getattr(base.exact.layers, name)) for name in MODULES}
        trainer = Trainer(self.reference, base.model, student, tokens, config, target=target, dense=dense)
        last = [0, time.perf_counter()]

        def show(point: CurvePoint, state: TrainState) -> None:
            del state
            steps, now = point.step - last[0], time.perf_counter()
            pace = f", {1000 * (now - last[1]) / steps:.1f} ms/step" if steps else ""
            last[:] = point.step, time.perf_counter()
            log(
                f"  {label}: step {point.step} loss {point.loss:.4f} held-out KL {point.held_out_kl:.4f}"
                f" hidden {point.held_out_hidden:.4f}{pace}"
            )

        try:
            params, curve = trainer.run(params, on_point=show)
        except TrainingDiverged as error:
            log(f"  {label}: {error}")
            params, curve = error.params, []
        return params, [dataclasses.asdict(point) for point in curve]

    def damage(self, key: Any, dense: dict[str, jax.Array]) -> np.ndarray:
        """Measure the damage of each module of a base, once."""
        if key not in self._damage:
            with self.timed("damage"):
                tokens = self.tokens[: self.config.damage_sequences]
                self._damage[key] = module_damage(
                    self.reference, dense, tokens, batch_size=self.config.batch_size, attend=self.attend
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
        if arm.compensate:
            model, details = self._compensate(arm, base, w4_bytes)
            result |= details
            result["perplexity"] = self.scores(model)
            tasks = self.accuracies(model)
        else:
            result["perplexity"] = base_result["perplexity"]
            tasks = base_result["tasks"]
        if tasks:
            result["tasks"] = {"reference": self.reference_accuracies, "rtn": rtn["tasks"], "arm": tasks}
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
            damage = self.damage(base_key, dense)
        if base_key not in self._low_ranks:
            with self.timed("whitened errors"):
                self._low_ranks[base_key] = jax.block_until_ready(
                    {name: whitened_svd(errors[name], moments[name], rank=self.config.spectrum) for name in errors}
                )
        low_ranks = self._low_ranks[base_key]
        budget = int(arm.budget * w4_bytes)
        ranks, placed, diagnosis = choose_ranks(
            errors, moments, damage, budget=budget, strategy=arm.placement, gate=arm.gate, max_rank=arm.max_rank,
            seed=arm.seed, flatten=arm.flatten, bits=arm.bits, low_ranks=low_ranks,
        )  # fmt: skip
        student = Student(ranks=ranks, gate=arm.gate, int8=arm.int8, bits=arm.bits)
        key = jax.random.key(arm.seed)
        params = initial_compensators(errors, moments, ranks, arm.gate, key=key, low_ranks=low_ranks)
        del errors
        initial = None
        if self.config.initial:
            initial = self.scores(student.finish(base, params))
            log(f"  {arm.name}: whitened SVD {initial}")
        if arm.joint:
            params |= zero_byte_params(base, start.exact, tuple(arm.joint.split("+")))
        config = dataclasses.replace(arm.train, seed=arm.seed)
        params, curve = self.train(start, student, params, config, arm.pool, label=arm.name)
        model = student.finish(base, params, exact=start.exact)
        if self.config.save is not None:
            save_params(self.config.save / f"{arm.name}.npz", params, ranks, model)
        nbytes = placed.nbytes if arm.bits < 8 else sum(bank.nbytes for bank in model.compensators.values())
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


def save_params(path: Path, params: Params, ranks: dict[str, tuple[int, ...]], model: Decoder) -> None:
    """Write parameters, ranks and the finished model's scales as one npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {
        jax.tree_util.keystr(key, simple=True, separator="."): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    flat |= {f"ranks.{name}": np.asarray(values) for name, values in ranks.items()}
    for name in ranks:
        weight = getattr(model.layers, name).weight
        flat |= {f"stored.{name}.scale": np.asarray(weight.scale.astype(jnp.float32))}
    np.savez(path, allow_pickle=False, **flat)


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Run all arms; give and write the results.

    Raises:
        ValueError: No arm, no text, or an input does not fit.
    """
    if config.preset and config.preset not in PRESETS:
        raise ValueError(f"unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
    texts = (*PRESETS.get(config.preset, ()), *config.arms)
    arms = [parse_arm(text, config.common) for text in texts]
    if not arms or not config.text:
        raise ValueError("give --preset or --arms, and --text to measure on")
    bench = Workbench(config)
    log(f"reference {bench.reference_scores}")
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": package_versions("jax", "flax", "optax", "numpy"),
        "command": " ".join(["python -m calibrate.ablate", *sys.argv[1:]]),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "seconds": bench.marks,
        "arms": {},
    }
    for arm in arms:
        result = bench.run(arm)
        results["arms"][arm.name] = result
        share = {name: f"{value:.2f}" for name, value in result["perplexity"].items()}
        part = {name: f"{100 * value:.1f}%" for name, value in result["recovered_of_rtn"].items()}
        own = {name: f"{100 * value:.1f}%" for name, value in result["recovered_of_base"].items()}
        bytes_ = f"{100 * result.get('overhead_of_model', 0):.3f}% of the model"
        log(f"{arm.name}: {share} | of the RTN gap {part}, of the base's {own} | {bytes_} | {result['seconds']:.0f} s")
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            config.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    """Run the command line."""
    run_main(lambda: _main(parse_flags(AblateConfig, prog="python -m calibrate.ablate")))


def _main(config: AblateConfig) -> None:
    results = ablate(config)
    summary = {
        name: {
            key: arm.get(key) for key in ("perplexity", "recovered_of_rtn", "recovered_of_base", "overhead_of_model")
        }
        for name, arm in results["arms"].items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
