"""From a configuration to a running engine, saying what happens and how long each phase takes."""

import contextlib
import logging
import time
from collections.abc import Iterator

import jax
import jax.monitoring
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from serve.config import ServeConfig
from serve.cpu import cpu_logits, lay_out_for_cpu
from serve.engine import Engine
from serve.gateway import Gateway, ModelInfo
from serve.gpu import command_buffer_options
from serve.layout import lay_out
from serve.metrics import Metrics
from serve.runner import Runner
from serve.scheduler import SlotScheduler
from spear_jax.models.decoder import Decoder, unstack
from spear_jax.models.quantize import expand_model, expand_tables, quantize_model, quantize_tables, weight_bytes
from spear_jax.models.source import DEMO
from spear_jax.quant import QuantSpec, QuantTensor
from spear_jax.sharding import ShardingRules, divide, make_mesh, part_of

log = logging.getLogger(__name__)

_DEFAULT_CONTEXT = 2048
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


def start_engine(config: ServeConfig, gateway: Gateway, console: Console) -> Engine:
    """Load, quantize and compile a model, start its engine, and open the gateway to requests.

    Raises:
        ValueError, OSError: The model or the settings cannot be used.
    """
    from spear_jax.loading import load
    from spear_jax.recovery import load_recovered

    with Phases(console) as phases:
        mesh = make_mesh(config.tensor_parallel) if config.tensor_parallel > 1 else None
        with phases.phase("load"):
            if recovers(config):
                loaded = load_recovered(dtype=config.dtype)
            else:
                placement = None if mesh is None else ShardingRules().placement(mesh)
                loaded = load(config.model, dtype=config.dtype, shardings=placement)
        if mesh is not None:
            part_of(loaded.config, mesh.size)  # refuses what cannot be divided before the slow work
        context = _context(config, loaded.config.max_position)
        with phases.phase("prepare weights" if config.quantize == "none" else "quantize"):
            model, description, dense = prepare(loaded.model, config, mesh)
            name, tokenizer, architecture = loaded.name, loaded.tokenizer, loaded.config
            del loaded
        runner = Runner(
            model,
            slots=config.max_slots,
            context=context,
            buckets=config.prefill_buckets,
            lone_program=jax.default_backend() == "cpu" and mesh is None,
            logits=cpu_logits if dense else Decoder.logits,
            greedy_program=jax.default_backend() == "gpu",
            compiler_options=command_buffer_options(config.command_buffers) if jax.default_backend() == "gpu" else None,
            mesh=mesh,
        )
        with phases.phase("compile", steps=runner.num_programs):
            for program in runner.warm_up():
                phases.advance(f"compiled {program}")
        log.info(
            "%s: %s, %.0f MiB; KV cache %.0f MiB for %d slots of %d tokens; started in %.1f s",
            name,
            description,
            weight_bytes(model) / 2**20,
            runner.cache_bytes / 2**20,
            config.max_slots,
            context,
            phases.seconds,
        )
    names = (config.served_model_name,) if config.served_model_name else (name, config.model)
    metrics = Metrics(names[0])
    backend = tokenizer.backend_tokenizer
    engine = Engine(
        runner,
        SlotScheduler(num_slots=config.max_slots, buckets=config.prefill_buckets, stall_tokens=config.stall_tokens),
        decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
        deliver=gateway.deliver,
        metrics=metrics,
        context=context,
    )
    info = ModelInfo(
        names=tuple(dict.fromkeys(names)),
        tokenizer=tokenizer,
        context=context,
        vocab_size=architecture.vocab_size,
        bos_id=architecture.bos_id,
        eos_ids=architecture.eos_ids,
    )
    count_compilations(metrics)
    engine.start()
    gateway.ready(engine, info, metrics, stuck_seconds=config.stuck_seconds)
    return engine


def count_compilations(metrics: Metrics) -> None:
    """Count every program that XLA compiles or fetches from the cache from now on: there should be none."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        del duration_secs
        if event == _COMPILE_EVENT:
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
