"""Which replica gets a request: pure, without Ray; the same code routes requests in a cluster and in the simulator.

Times are seconds. A prompt is known by the keys of its blocks, each of which stands for all text up to its end.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from serve.latency import LatencyTable
from serve.request import Slo

type Policy = Literal["prefix", "slack", "round-robin"]

BLOCK_CHARACTERS = 256
"""Text that one block of a prompt over HTTP stands for; a token has about four characters."""

CHARACTERS_PER_TOKEN = 4
_EXPECTED_ANSWER = 256.0
_TYPICAL_CONTEXT = 1024.0


class PrefixCache:
    """Blocks of prompts in order of use, at most `capacity` of them; who has not been asked for longest goes first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._blocks: collections.OrderedDict[Hashable, None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def hits(self, blocks: Sequence[Hashable]) -> int:
        """Count the leading blocks that are held."""
        held = self._blocks
        return sum(1 for _ in itertools.takewhile(held.__contains__, blocks))

    def add(self, blocks: Sequence[Hashable]) -> None:
        """Hold blocks, the first of them longest: without it the others are of no use."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Arrival:
    """What a router knows of a request: its blocks, how many tokens its prompt has, about, and its limits on time."""

    blocks: Sequence[Hashable] = ()
    tokens: int = 1
    slo: Slo = dataclasses.field(default_factory=Slo)


@dataclasses.dataclass(kw_only=True)
class _Replica:
    cache: PrefixCache
    queued: float = 0.0  # prompt tokens to compute before a newcomer's
    running: int = 0


@dataclasses.dataclass(kw_only=True, eq=False)
class _Sent[Name]:
    replica: Name
    tokens: float  # of its prompt that its replica has yet to compute; 0 from its first token on


class Router[Name: Hashable]:
    """Chooses a replica for each request and keeps count of what each has to do, from what is told here alone.

    `prefix`: of the replicas that would answer in time (`share` of the limit on the first token), the one that holds
    most of the prompt; where none would, or nothing is held, the one that would answer first. `slack`: the one with
    most slack, whatever it holds. `round-robin`: each in turn.

    When a replica would answer is predicted from the latency table: the tokens queued there and the prompt's own that
    are not held, at the pace of chunks beside those who decode. Without a table, or for requests without a limit, a
    replica that holds the prompt is in time while it has to compute no more than the least busy one would.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        slots: int,
        cache_blocks: int,
        block_tokens: int,
        table: LatencyTable | None = None,
        share: float = 0.9,
    ):
        if policy not in (known := get_args(Policy.__value__)):
            raise ValueError(f"router {policy!r} is none of {', '.join(known)}")
        self._policy = policy
        self._slots, self._cache_blocks, self._block_tokens = slots, cache_blocks, block_tokens
        self._table, self._share = table, share
        self._replicas: dict[Name, _Replica] = {}
        self._sent: dict[Hashable, _Sent[Name]] = {}
        self._turn = 0
        self._paces: dict[tuple[int, float], float] = {}

    def update(self, replicas: Iterable[Name]) -> None:
        """Say which replicas there are; what was known of those that are gone is forgotten."""
        now = list(replicas)
        self._replicas = {
            name: self._replicas.get(name) or _Replica(cache=PrefixCache(self._cache_blocks)) for name in now
        }
        self._sent = {key: sent for key, sent in self._sent.items() if sent.replica in self._replicas}

    def rank(self, arrival: Arrival) -> list[Name]:
        """Give the replicas, best first; nothing is counted before `sent`."""
        names = list(self._replicas)
        if self._policy == "round-robin":
            self._turn += 1
            return names[self._turn % len(names) :] + names[: self._turn % len(names)] if names else []
        use_hits = self._policy == "prefix"
        held = [self._held(r, arrival) if use_hits else 0.0 for r in self._replicas.values()]
        until = [self._until_first(r, arrival, h) for r, h in zip(self._replicas.values(), held, strict=True)]
        limit = self._share * arrival.slo.ttft
        if self._table is None or not arrival.slo.declared:
            limit = min(until, default=0.0)
        order = sorted(
            range(len(names)),
            key=lambda i: (until[i] > limit, -held[i] if until[i] <= limit else 0.0, until[i], self._load(names[i])),
        )
        return [names[i] for i in order]

    def sent(self, key: Hashable, arrival: Arrival, replica: Name) -> None:
        """Count a request as given to a replica; `key` names it from here on. Replicas that are gone are let be."""
        if (found := self._replicas.get(replica)) is None:
            return
        tokens = max(arrival.tokens - self._held(found, arrival), 1.0)
        self._sent[key] = _Sent(replica=replica, tokens=tokens)
        found.queued += tokens
        found.running += 1
        found.cache.add(arrival.blocks)

    def began(self, key: Hashable) -> None:
        """Say that a request's first token has come; unknown ones are fine."""
        if (sent := self._sent.get(key)) is not None:
            self._replicas[sent.replica].queued -= sent.tokens
            sent.tokens = 0.0

    def ended(self, key: Hashable) -> None:
        """Say that a request is over, whichever way; unknown ones are fine."""
        self.began(key)
        if (sent := self._sent.pop(key, None)) is not None:
            self._replicas[sent.replica].running -= 1

    def _load(self, name: Name) -> tuple[int, float]:
        replica = self._replicas[name]
        return replica.running, replica.queued

    def _held(self, replica: _Replica, arrival: Arrival) -> float:
        return float(min(replica.cache.hits(arrival.blocks) * self._block_tokens, arrival.tokens - 1))

    def _until_first(self, replica: _Replica, arrival: Arrival, held: float) -> float:
        """Give the seconds until a newcomer's first token; without a table, the tokens to compute until then."""
        work = replica.queued + arrival.tokens - held
        if self._table is None:
            return work
        over = max(replica.running + 1 - self._slots, 0)
        limit = min(arrival.slo.itl, arrival.slo.tpot)
        seconds = work * self._pace(min(replica.running, self._slots), limit)
        if over:
            step = float(self._table.at(self._slots, _TYPICAL_CONTEXT)[0, 0])
            seconds += over * _EXPECTED_ANSWER / self._slots * step
        return seconds

    def _pace(self, running: int, limit: float) -> float:
        """Give the seconds of a prompt's token beside so many who decode, within a limit between theirs."""
        key = running, limit
        if key not in self._paces:
            assert self._table is not None
            seconds = self._table.at(running, _TYPICAL_CONTEXT)[0]
            column = int(np.searchsorted(seconds, self._share * limit, side="right")) - 1
            column = min(max(column, 1), len(seconds) - 1)
            self._paces[key] = float(seconds[column] / self._table.chunks[column])
        return self._paces[key]


def arrival_of(body: bytes, slo: Slo) -> Arrival:
    """Read from the body of an OpenAI call what routing needs; one that cannot be read has no prefix.

    A conversation is known by its messages, a text prompt by its characters, one of token ids by these.
    """
    try:
        content: Any = json.loads(body)
        prompt = content["messages"] if "messages" in content else content["prompt"]
    except (ValueError, KeyError, TypeError):
        return Arrival(slo=slo)
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    data = text.encode()
    blocks, running = [], hashlib.blake2b(digest_size=8)
    for start in range(0, len(data) - BLOCK_CHARACTERS + 1, BLOCK_CHARACTERS):
        running.update(data[start : start + BLOCK_CHARACTERS])
        blocks.append(running.digest())
    return Arrival(blocks=blocks, tokens=max(len(data) // CHARACTERS_PER_TOKEN, 1), slo=slo)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """When replicas are added and taken away. `attained` is the share of answers in time below which one is added."""

    least: int
    most: int
    attained: float = 0.9
    queued: float = 1.0
    idle: float = 0.5


def wanted_replicas(
    scaling: Scaling, *, replicas: int, slots: int, waiting: float, running: float, kept: Mapping[bool, float]
) -> int:
    """Give how many replicas there should be.

    `waiting` and `running` are requests over all replicas, `kept` counts answers with limits that ended lately, by
    whether they were in time. One more than now if more than `scaling.queued` wait for each replica, or too few were
    in time; as many as put `running` at or below `scaling.idle` of the slots of those left if nothing waits and all
    is in time: one is taken away at a time.
    """
    answers = sum(kept.values())
    late = answers > 0 and kept.get(True, 0.0) < scaling.attained * answers
    if waiting > scaling.queued * replicas or late:
        wanted = replicas + max(1, int(waiting / max(slots, 1)))
    elif not waiting and running <= scaling.idle * slots * (replicas - 1):
        wanted = replicas - 1
    else:
        wanted = replicas
    return min(max(wanted, scaling.least), scaling.most)
