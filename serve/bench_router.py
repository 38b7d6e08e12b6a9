"""`python -m serve.bench_router`: how long the choice of a replica takes, by how many there are. JSON on stdout."""

import dataclasses
import json
import time

import numpy as np

from serve.latency import hardware, roofline
from serve.request import Slo
from serve.router import Arrival, Router, arrival_of
from spear_jax.cli import parse_flags, run_main
from spear_jax.config import ModelConfig

_ARCHITECTURE = ModelConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=131072,
)  # fmt: skip
_BLOCKS, _PROMPTS, _SLOTS = 40, 50, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterBenchConfig:
    """Measure the router on replicas that hold prompts of 40 blocks and are busy. Microseconds on stdout as JSON."""

    replicas: tuple[int, ...] = (2, 10, 100, 1000)
    """Numbers of replicas to choose from."""

    requests: int = 300
    """How many choices to time."""


def bench(config: RouterBenchConfig) -> list[dict[str, float]]:
    """Time choices, in CPU time, so that a busy machine changes little; give P50 and P99 in microseconds."""
    table = roofline(
        _ARCHITECTURE, hardware(), decodes=(0, 1, 8, _SLOTS), chunks=(0, 64, 256, 1024), contexts=(1, 1024, 4096)
    ).table
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 2000}]}).encode()
    found = []
    for count in config.replicas:
        router = Router[int]("prefix", slots=_SLOTS, cache_blocks=16384, block_tokens=64, table=table)
        router.update(range(count))
        seconds = []
        for i in range(4 * count + config.requests):
            blocks = [(i % _PROMPTS, block) for block in range(_BLOCKS)]
            arrival = Arrival(blocks=blocks, tokens=64 * _BLOCKS + 40, slo=Slo(ttft=1.0))
            begin = time.process_time()
            router.update(range(count))
            chosen = router.rank(arrival)[0]
            router.sent(i, arrival, chosen)
            router.ended(i - count)
            seconds.append(time.process_time() - begin)
        p50, p99 = 1e6 * np.percentile(seconds[-config.requests :], (50, 99))
        begin = time.process_time()
        for _ in range(config.requests):
            arrival_of(body, Slo())
        reading = 1e6 * (time.process_time() - begin) / config.requests
        found.append({"replicas": count, "p50_us": float(p50), "p99_us": float(p99), "read_10_kb_us": reading})
    return found


def main() -> None:
    """Run the command line."""
    run_main(
        lambda: print(json.dumps(bench(parse_flags(RouterBenchConfig, prog="python -m serve.bench_router")), indent=1))
    )


if __name__ == "__main__":
    main()
