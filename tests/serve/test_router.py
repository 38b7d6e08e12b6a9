"""Which replica gets a request, how many there should be, and what the prefix of a call is."""

import json

import numpy as np
import pytest

from serve.bench_router import RouterBenchConfig, bench
from serve.latency import LatencyTable, hardware, make_table
from serve.load import BLOCK_TOKENS, Job
from serve.request import Slo
from serve.router import Arrival, PrefixCache, Router, Scaling, arrival_of, wanted_replicas
from serve.simulate import Deployment, make_scheduler, simulate, simulate_replicas
from serve.slots import SlotScheduler, Timing


def table() -> LatencyTable:
    """A millisecond for a prompt's token, 10 for a decode step."""
    decodes, chunks, contexts = (0, 8), (0, 16, 64), (1, 1000)
    d, c, _ = np.meshgrid(decodes, chunks, contexts, indexing="ij")
    return make_table(
        (np.where(d > 0, 0.01, 0) + 1e-3 * c)[None], decodes=decodes, chunks=chunks, contexts=contexts, longest=False
    )


def router(policy: str = "prefix", *, timed: bool = True, cache: int = 100) -> Router[str]:
    made = Router[str](policy, slots=8, cache_blocks=cache, block_tokens=10, table=table() if timed else None)  # type: ignore[arg-type]
    made.update("abc")
    return made


def test_a_cache_keeps_what_was_used_last_and_beginnings_longest() -> None:
    cache = PrefixCache(4)
    cache.add((1, 2, 3))
    cache.add((1, 5))
    assert [cache.hits((1, 2, 3)), cache.hits((1, 5, 6)), cache.hits((2, 3)), cache.hits(())] == [3, 2, 2, 0]
    cache.add((7,))
    assert len(cache) == 4
    assert [cache.hits((1, 2, 3)), cache.hits((1, 5)), cache.hits((7,))] == [2, 2, 1]


def test_prompts_go_to_who_holds_them_while_that_is_in_time() -> None:
    made, slo = router(), Slo(ttft=1.0)
    prompt = Arrival(blocks=tuple(range(30)), tokens=300, slo=slo)
    assert made.rank(prompt)[0] == "a"
    made.sent("first", prompt, "b")
    assert made.rank(prompt)[0] == "b"
    assert made.rank(Arrival(tokens=300, slo=slo))[0] == "a"
    made.sent("other", Arrival(tokens=800, slo=slo), "b")
    assert made.rank(prompt)[0] == "a", "b would be late"
    made.began("other")
    assert made.rank(prompt)[0] == "b"
    assert router("slack").rank(prompt) == ["a", "b", "c"]


def test_without_a_table_prompts_go_to_who_has_least_to_compute() -> None:
    made = router(timed=False)
    prompt = Arrival(blocks=tuple(range(30)), tokens=300)
    made.sent(1, prompt, "c")
    made.ended(1)
    assert made.rank(prompt)[0] == "c"
    made.sent(2, Arrival(tokens=250), "c")
    assert made.rank(prompt)[0] == "c"
    made.sent(3, Arrival(tokens=250), "c")
    assert made.rank(prompt)[0] == "a"


def test_replicas_take_turns_and_those_gone_are_forgotten() -> None:
    made = router("round-robin")
    first = [made.rank(Arrival())[0] for _ in range(6)]
    assert sorted(first[:3]) == ["a", "b", "c"]
    assert first[:3] == first[3:]
    made.sent("x", Arrival(tokens=50), "c")
    made.update("ab")
    made.ended("x")
    made.sent("y", Arrival(), "c")
    assert sorted(made.rank(Arrival())) == ["a", "b"]
    made.update("")
    assert made.rank(Arrival()) == []
    with pytest.raises(ValueError, match="none of prefix, slack, round-robin"):
        router("magic")


def test_the_prefix_of_a_call() -> None:
    def chat(*texts: str) -> bytes:
        return json.dumps({"model": "m", "messages": [{"role": "user", "content": text} for text in texts]}).encode()

    long = "word " * 300
    one, two = (arrival_of(chat(long, end), Slo()) for end in ("what?", "why? " * 100))
    assert len(one.blocks) >= 5
    assert list(one.blocks[:5]) == list(two.blocks[:5])
    assert one.blocks[0] != arrival_of(chat("other " + long), Slo()).blocks[0]
    assert 300 < one.tokens < 500
    for body in (b"", b"[1]", b'{"model": 3}', b"\xff"):
        assert arrival_of(body, Slo(ttft=2.0)).blocks == ()


@pytest.mark.parametrize(
    ("waiting", "running", "kept", "wanted"),
    [
        (0, 20, {}, 3),
        (4, 24, {}, 4),
        (40, 24, {}, 6),
        (0, 20, {True: 8, False: 2}, 4),
        (0, 20, {True: 95, False: 5}, 3),
        (0, 8, {True: 9, False: 0}, 2),
        (0, 9, {}, 3),
        (500, 24, {}, 6),
    ],
)
def test_how_many_replicas_there_should_be(waiting: int, running: int, kept: dict[bool, float], wanted: int) -> None:
    scaling = Scaling(least=2, most=6)
    assert wanted_replicas(scaling, replicas=3, slots=8, waiting=waiting, running=running, kept=kept) == wanted


def scheduler() -> SlotScheduler:
    return make_scheduler("slo", buckets=(16, 64), slots=8, stall_tokens=16, timing=Timing(table=table(), share=1.0))


def test_simulated_replicas_share_the_work_and_keep_prefixes() -> None:
    """Conversations of two turns: with affinity the second finds the first where it was computed."""
    tokens = BLOCK_TOKENS
    jobs = [Job(at=1.5 * i, prompt=tokens + 10, output=3, blocks=(i % 7, 100 + i)) for i in range(21)]
    slo = Slo(ttft=2.0)
    found = {}
    for policy in ("prefix", "round-robin"):
        deployment = Deployment(router=policy, cached_tokens=64 * tokens)
        answers, _ = simulate_replicas(
            [scheduler(), scheduler()], table(), jobs, slo=slo, deployment=deployment, table=table()
        )
        assert all(len(answer.times) == 3 for answer in answers)
        found[policy] = sum(answer.cached for answer in answers)
    assert found["prefix"] == 14 * tokens
    assert found["round-robin"] == 7 * tokens, "each of seven comes to one replica, to the other, and again"
    burst = [Job(at=0.0, prompt=100, output=20) for _ in range(16)]
    alone, _ = simulate(scheduler(), table(), burst, slo=slo)
    both, _ = simulate_replicas(
        [scheduler(), scheduler()], table(), burst, slo=slo, deployment=Deployment(router="slack"), table=table()
    )
    assert max(a.times[0] for a in both) < 0.6 * max(a.times[0] for a in alone)


def test_chips_by_name() -> None:
    four = hardware("tpu7xx4")
    assert (four.name, four.devices, hardware("tpu7x").devices) == ("4 tpu7x", 4, 1)
    for spec in ("h900", "h200x0", "x4"):
        with pytest.raises(ValueError, match="is none of h200"):
            hardware(spec)


def test_the_choice_is_timed() -> None:
    rows = bench(RouterBenchConfig(replicas=(2, 20), requests=20))
    assert [row["replicas"] for row in rows] == [2, 20]
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)
