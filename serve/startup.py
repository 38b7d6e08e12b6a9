"""From a configuration to a running engine, saying what happens and how long each phase takes."""

import contextlib
import dataclasses
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pallas_kernels import dispatch
from pallas_kernels.tuning import device_name
from serve.compare import ComparedEngines
from serve.config import SchedulerConfig, ServeConfig
from serve.cpu import cpu_logits, lay_out_for_cpu
from serve.engine import Engine
from serve.gateway import Gateway, ModelInfo
from serve.gpu import command_buffer_options
from serve.hosts import Group, led
from serve.latency import Profile, load_profile
from serve.layout import lay_out
from serve.loop import LoopRunner, LoopSettings
from serve.metrics import Metrics
from serve.pages import PAGE, PagePool, pages_for
from serve.request import Slo
from serve.runner import Runner, cache_page_bytes
from serve.slots import SlotScheduler, Timing
from spear_jax.cli import cache_dir
from spear_jax.config import ModelConfig, load_yaml
from spear_jax.evaluation.comparison import without_compensators
from spear_jax.hosts import least_of_all
from spear_jax.loading import find_checkpoint
from spear_jax.models import LoadedModel, activation_dtype
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import expand_model, expand_tables, quantize_model, quantize_tables, weight_bytes
from spear_jax.models.source import DEMO
from spear_jax.quant import QuantSpec, QuantTensor
from spear_jax.sharding import ShardingRules, divide, make_mesh, part_of
from spear_jax.versions import package_versions

log = logging.getLogger(__name__)

RANDOM = "random:"
"""What the name of a model begins with whose weights are drawn; the YAML file of its architecture follows."""

_DEFAULT_CONTEXT = 2048
_STEPS_PER_CALL = 16
_MEMORY_SHARE = 0.95
"""Of the memory that JAX may use; some is lost between arrays."""

_GROUP_SIZE = 32
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Phases:
    """Shows the phases of a start: a live display on a terminal, and a line with the seconds when each is done."""

    def __init__(self, console: Console):
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._begin = time.monotonic()

    def __enter__(self) -> "Phases":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def phase(self, name: str, *, steps: int = 1) -> Iterator[None]:
        """Time a phase of `steps` parts; `advance` ends a part."""
        self._task = self._progress.add_task(name, total=steps)
        begin = time.monotonic()
        yield
        self._progress.remove_task(self._task)
        log.info("%s: %.1f s", name, time.monotonic() - begin)

    def advance(self, description: str) -> None:
        """Say what the current phase does now, and that the part before is done."""
        self._progress.update(self._task, description=description, advance=1)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model laid out for this machine, and what is known of it; `scores`, if asked for, of compensated modules."""

    model: Decoder
    mesh: Mesh | None
    name: str
    tokenizer: Any
    architecture: ModelConfig
    description: str
    dense: bool
    context: int
    scores: Mapping[str, float]


def load_prepared(config: ServeConfig, phases: Phases, *, score: bool = False) -> Prepared:
    """Load a model, quantize it where it is to be, and lay it out; with `score`, look at its compensators first.

    Raises:
        ValueError, OSError: The model or the settings cannot be used.
    """
    from serve.profile import correction_scores
    from spear_jax.loading import load
    from spear_jax.recovery import load_recovered

    mesh = make_mesh(config.tensor_parallel) if config.tensor_parallel > 1 else None
    with phases.phase("load"):
        if recovers(config):
            loaded = load_recovered(dtype=config.dtype)
        elif config.model.startswith(RANDOM):
            loaded = _random(config)
        else:
            placement = None if mesh is None else ShardingRules().placement(mesh)
            loaded = load(config.model, dtype=config.dtype, shardings=placement)
    if mesh is not None:
        part_of(loaded.config, mesh.size)  # refuses what cannot be divided before the slow work
    context = _context(config, loaded.config.max_position)
    scores = correction_scores(loaded.model.compensators) if score else {}
    with phases.phase("prepare weights" if config.quantize == "none" else "quantize"):
        model, description, dense = prepare(loaded.model, config, mesh)
    return Prepared(
        model=model,
        mesh=mesh,
        name=loaded.name,
        tokenizer=loaded.tokenizer,
        architecture=loaded.config,
        description=description,
        dense=dense,
        context=context,
        scores=scores,
    )


def _random(config: ServeConfig) -> LoadedModel:
    """Make a model of random int4 weights, with compensators of rank 16, whose words are numbers."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from serve.bench_step import random_model

    if config.tensor_parallel > 1:
        raise ValueError(f"{config.model}: random weights are made on one device, not on {config.tensor_parallel}")
    path = Path(config.model.removeprefix(RANDOM))
    architecture = load_yaml(ModelConfig, path)
    spec = QuantSpec(group_size=-1 if config.group_size is None else config.group_size)
    words = {f"{i}": i for i in range(architecture.vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return LoadedModel(
        model=random_model(architecture, spec=spec, rank=16, dtype=activation_dtype(config.dtype)),
        name=f"{path.stem}-random",
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="0"),
        config=architecture,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Pages of the KV cache, nobody's among them, of `page_bytes` each on a device; `context` tokens a sequence."""

    pages: int
    page_bytes: int
    context: int

    def __str__(self) -> str:
        tokens = (self.pages - 1) * PAGE
        gib = self.pages * self.page_bytes / 2**30
        return f"KV cache of {self.pages - 1} pages, {tokens} tokens, {gib:.2f} GiB a device"


def plan_cache(prepared: Prepared, config: ServeConfig) -> CachePlan:
    """Choose the size of the KV cache: as set, on CPU what all slots can fill, elsewhere what memory is left.

    For the latter a server with next to no cache is made and the programs that need most are compiled: what they need
    beside, and what the rest of the state takes, is known then. A cache that holds less than a context shortens it.

    Raises:
        ValueError: There is no room for a cache, or not for the context that was asked for.
    """
    page_bytes = cache_page_bytes(prepared.model, int8=config.kv_cache_dtype == "int8")
    pages = 1 + config.max_slots * pages_for(prepared.context)
    if config.kv_cache_gib is not None:
        pages = int(config.kv_cache_gib * 2**30) // page_bytes
    elif jax.default_backend() != "cpu":
        dry = make_runner(prepared, config, pages=2, kept=())
        temporary = dry.temporary_bytes()
        memory = [device.memory_stats() or {} for device in jax.local_devices()[: config.tensor_parallel]]
        if all({"bytes_limit", "bytes_in_use"} <= one.keys() for one in memory):
            free = min(_MEMORY_SHARE * one["bytes_limit"] - one["bytes_in_use"] for one in memory)
            engines = 2 if config.compare else 1
            pages = 2 + int(free / engines - temporary) // page_bytes
    pages = least_of_all(pages)
    tokens = (pages - 1) * PAGE
    least = 2 * PAGE if config.max_context is None else config.max_context
    if tokens < least:
        raise ValueError(
            f"the KV cache has room for {max(tokens, 0)} tokens, {least} are needed: {page_bytes / 2**20:.2f} MiB for "
            f"{PAGE} tokens; give it more (kv_cache_gib), or ask for a smaller max_context or fewer max_slots"
        )
    return CachePlan(pages=pages, page_bytes=page_bytes, context=min(prepared.context, tokens))


def with_planned_cache(prepared: Prepared, config: ServeConfig, phases: Phases) -> tuple[Prepared, CachePlan]:
    """Plan the KV cache of a model, and hold it to the context that goes into it.

    Raises:
        ValueError: As `plan_cache`.
    """
    with phases.phase("plan memory"):
        plan = plan_cache(prepared, config)
    return dataclasses.replace(prepared, context=plan.context), plan


def make_runner(
    prepared: Prepared,
    config: ServeConfig,
    *,
    kept: Sequence[Sequence[str]],
    pages: int | None = None,
    loop: LoopSettings | None = None,
) -> Runner:
    """Give the runner of a model, with so many pages or for all slots in full; its programs are not compiled yet.

    With `loop` it chooses by itself what to do.
    """
    backend = jax.default_backend()
    options: dict[str, Any] = {
        "slots": config.max_slots,
        "context": prepared.context,
        "buckets": config.prefill_buckets,
        "lone_program": backend == "cpu" and prepared.mesh is None,
        "logits": cpu_logits if prepared.dense else Decoder.logits,
        "compiler_options": command_buffer_options(config.command_buffers) if backend == "gpu" else None,
        "mesh": prepared.mesh,
        "kept": kept,
        "pages": pages,
        "int8_cache": config.kv_cache_dtype == "int8",
    }
    if loop is not None:
        return LoopRunner(prepared.model, settings=loop, **options)
    return Runner(prepared.model, greedy_program=backend == "gpu", **options)


def loop_settings(config: ServeConfig, timing: Timing | None) -> LoopSettings | None:
    """Give how the device chooses its work, or None where the host starts each program."""
    steps = config.steps_per_call
    if steps is None:
        steps = 1 if jax.default_backend() == "gpu" else _STEPS_PER_CALL
    if steps == 1 or jax.process_count() > 1:  # the loop's state was not tried over several processes
        return None
    limits = {} if timing is None else {"table": timing.table, "share": timing.share}
    return LoopSettings(passes=steps, stall_tokens=config.stall_tokens, **limits)


def start_bare_runner(prepared: Prepared, config: ServeConfig, console: Console, *, pages: int) -> Runner:
    """Compile the same model without compensators; it shares the other arrays.

    Raises:
        ValueError: There are no compensators to leave out.
    """
    if not prepared.model.compensators:
        raise ValueError("compare: this model has no error compensators")
    bare = dataclasses.replace(prepared, model=without_compensators(prepared.model))
    runner = make_runner(bare, config, kept=(), pages=pages, loop=loop_settings(config, None))
    with Phases(console) as phases, phases.phase("compile without compensators", steps=runner.num_programs):
        for program in runner.warm_up():
            phases.advance(f"compiled {program}")
    return runner


def table_path(config: ServeConfig) -> Path | None:
    """Say where the latency table of a model is: beside its checkpoint, or in the cache folder; None for none."""
    where = config.scheduler.latency_table
    if where == "none":
        return None
    if where != "auto":
        return Path(where).expanduser()
    of = f"{device_name()}-tp{config.tensor_parallel}.json"
    checkpoint = find_checkpoint(config.model)
    if checkpoint is not None:
        return checkpoint.parent / f"{checkpoint.name}-latency-{of}"
    return cache_dir() / "latency" / f"{re.sub(r'[^\w.]+', '-', config.model)}-{of}"


def table_identity(config: ServeConfig, prepared: Prepared) -> dict[str, Any]:
    """Say what a latency table is of: with another value of any of these it is another table."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "model": prepared.name,
        "weights": prepared.description,
        "tp": config.tensor_parallel,
        "reduction": config.reduction if config.tensor_parallel > 1 else None,
        "command buffers": config.command_buffers,
        "slots": config.max_slots,
        "context": prepared.context,
        "KV cache": config.kv_cache_dtype,
        "buckets": sorted(config.prefill_buckets),
    } | package_versions("jax", "spear-jax")


def find_profile(config: ServeConfig, prepared: Prepared) -> Profile | None:
    """Read the latency table; one that was not named and does not fit is passed over if nothing depends on it.

    Raises:
        ValueError, OSError: There is none or it does not fit, and it was named, or limits on time need it.
    """
    settings, path = config.scheduler, table_path(config)
    limits = (settings.itl_slo_ms, settings.tpot_slo_ms, settings.ttft_slo_ms)
    needed = any(limit is not None for limit in limits) or settings.admission == "refuse"
    if path is None:
        if needed:
            raise ValueError("limits on time need a latency table, and scheduler.latency_table is none")
        return None
    if settings.latency_table == "auto" and not needed and not path.is_file():
        return None
    try:
        profile = load_profile(path)
        profile.check(table_identity(config, prepared), path=path)
    except ValueError as error:
        if needed or settings.latency_table != "auto":
            raise
        log.warning("no latency table: %s", error)
        return None
    return profile


def timing_of(config: SchedulerConfig, profile: Profile) -> Timing:
    """Give what the scheduler judges deadlines by."""
    table = profile.table
    if not config.drop_compensators:
        table = dataclasses.replace(table, seconds=table.seconds[:1])
    return Timing(table=table, share=config.share, aging=config.aging_s, refuses=config.admission == "refuse")


def start_runner(config: ServeConfig, console: Console) -> tuple[Runner, Prepared, Timing | None]:
    """Load, quantize and compile a model, and find what its scheduler judges deadlines by.

    Raises:
        ValueError, OSError: The model or the settings cannot be used.
    """
    with Phases(console) as phases:
        prepared = load_prepared(config, phases)
        prepared, plan = with_planned_cache(prepared, config, phases)
        profile = find_profile(config, prepared)
        dropping = profile is not None and config.scheduler.drop_compensators
        timing = None if profile is None else timing_of(config.scheduler, profile)
        kept = profile.kept if profile is not None and dropping else ()
        runner = make_runner(prepared, config, kept=kept, pages=plan.pages, loop=loop_settings(config, timing))
        with phases.phase("compile", steps=runner.num_programs), kernels_used() as kernels:
            for program in runner.warm_up():
                phases.advance(f"compiled {program}")
        device = jax.devices()[0].device_kind
        log.info("device: %s; kernels: %s", device, ", ".join(sorted(kernels)) or "none, all by XLA")
        log.info(
            "%s: %s, %.0f MiB; %s, for %d slots of up to %d tokens; started in %.1f s",
            prepared.name,
            prepared.description,
            weight_bytes(prepared.model) / 2**20,
            plan,
            config.max_slots,
            prepared.context,
            phases.seconds,
        )
    return runner, prepared, timing


def start_engine(
    config: ServeConfig, gateway: Gateway, console: Console, group: Group | None = None
) -> Engine | ComparedEngines:
    """Load, quantize and compile a model, start its engine, and open the gateway to requests.

    With a `group` the other processes of it are told each call of the runner.

    Raises:
        ValueError, OSError: The model or the settings cannot be used.
    """
    if config.compare and group is not None:
        raise ValueError("compare: not with several processes")
    runner, prepared, timing = start_runner(config, console)
    names = (config.served_model_name,) if config.served_model_name else (prepared.name, config.model)
    metrics = Metrics(names[0])
    backend = prepared.tokenizer.backend_tokenizer
    bare = start_bare_runner(prepared, config, console, pages=runner.pages) if config.compare else None

    def engine_of(runner: Runner, metrics: Metrics, timing: Timing | None) -> Engine:
        scheduler = SlotScheduler(
            num_slots=config.max_slots,
            buckets=config.prefill_buckets,
            stall_tokens=config.stall_tokens,
            timing=timing,
            pages=PagePool(pages=runner.pages, table=runner.table_shape, prefix_caching=config.prefix_caching),
        )
        engine = Engine(
            runner if group is None else led(runner, group),
            scheduler,
            decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
            deliver=gateway.deliver,
            metrics=metrics,
            context=prepared.context,
        )
        engine.start()
        return engine

    info = ModelInfo(
        names=tuple(dict.fromkeys(names)),
        tokenizer=prepared.tokenizer,
        context=prepared.context,
        vocab_size=prepared.architecture.vocab_size,
        bos_id=prepared.architecture.bos_id,
        eos_ids=prepared.architecture.eos_ids,
    )
    count_compilations(metrics)
    engine = engine_of(runner, metrics, timing)
    if bare is not None:
        # What is asked of it is not the server's load: it keeps no limits, and its numbers are not shown.
        engine = ComparedEngines(engine, engine_of(bare, Metrics(f"{names[0]} without compensators"), None))
    gateway.ready(engine, info, metrics, stuck_seconds=config.stuck_seconds, slo=default_slo(config.scheduler))
    return engine


@contextlib.contextmanager
def kernels_used() -> Iterator[set[str]]:
    """Collect which backend is taken for each operation of what is traced inside, in any thread."""
    used: set[str] = set()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            used.add(record.getMessage())

    source, collector = dispatch.log, Collector()
    level, propagates = source.level, source.propagate
    source.addHandler(collector)
    source.setLevel(logging.DEBUG)
    source.propagate = False
    try:
        yield used
    finally:
        source.removeHandler(collector)
        source.setLevel(level)
        source.propagate = propagates


def default_slo(config: SchedulerConfig) -> Slo:
    """Give the limits of requests that ask for none."""
    return Slo.of_milliseconds(ttft=config.ttft_slo_ms, itl=config.itl_slo_ms, tpot=config.tpot_slo_ms)


def count_compilations(metrics: Metrics) -> None:
    """Count every program that XLA compiles or fetches from the cache from now on: there should be none.

    What other threads compile, to read a model again, does not count, as no step waits for it.
    """

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == _COMPILE_EVENT and threading.current_thread().name == Engine.THREAD:
            metrics.compilations.inc()

    jax.monitoring.register_event_duration_secs_listener(listen)


def _context(config: ServeConfig, max_position: int) -> int:
    if config.max_context is None:
        return min(_DEFAULT_CONTEXT, max_position)
    if config.max_context > max_position:
        raise ValueError(f"max_context {config.max_context} is more than the {max_position} positions of the model")
    return config.max_context


def recovers(config: ServeConfig) -> bool:
    """Say whether to serve the calibrated demo model that comes with the package."""
    return config.model == DEMO and config.quantize == "auto" and config.group_size is None


def prepare(model: Decoder, config: ServeConfig, mesh: Mesh | None = None) -> tuple[Decoder, str, bool]:
    """Quantize and lay out the weights for serving; says what was done, and whether they are dense ones on a CPU.

    With a mesh the parts of its devices are given, side by side.
    """
    cpu = jax.default_backend() == "cpu"
    expand = config.weights == "expanded" or (config.weights == "auto" and cpu)
    description = f"{jnp.dtype(model.dtype).name} weights as loaded"
    int4 = isinstance(model.layer(0).qkv.weight, QuantTensor)
    if int4:
        description = "int4 weights as stored"
        if model.compensators:
            added = sum(bank.nbytes for bank in model.compensators.values())
            description += f" with error compensators of {added / 2**20:.1f} MiB"
    elif config.quantize != "none":
        spec = QuantSpec(group_size=_GROUP_SIZE if config.group_size is None else config.group_size)
        groups = "a channel" if spec.group_size == -1 else f"groups of {spec.group_size}"
        description = f"int4 weights rounded to nearest, symmetric, {groups}"
        model, int4 = quantize_model(model, spec), True
    if config.embedding == "int8":
        model = quantize_tables(model)
    compressed = int4 or config.embedding == "int8"
    expand = expand and compressed
    dense = cpu and mesh is None and model.dtype == jnp.float32 and (expand or not compressed)
    if expand:
        description += f", expanded to {jnp.dtype(model.dtype).name}"
        model = expand_tables(model, model.dtype) if dense else expand_model(model, model.dtype)
    if dense:
        laid_out = lay_out_for_cpu
    elif cpu:
        laid_out = unstack
    else:
        laid_out = lay_out if compressed and not expand else lambda model: model
    if mesh is None:
        model = laid_out(model)
    else:
        model = divide(model, mesh, lay_out=laid_out, reduction=config.reduction)
        description += f", divided over {mesh.size} devices"
    return jax.block_until_ready(model), description, dense
