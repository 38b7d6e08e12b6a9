"""The serving loop: one program that runs several steps on the device and chooses the work of each by the policy."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from serve.latency import LatencyTable
from serve.request import UNBOUNDED, Request, SamplingParams, Slo
from serve.runner import DeviceState, Logits, Runner, decode_lone, decode_step, prefill_step, with_compensators_of
from serve.sampling import SamplingState
from serve.scheduler import Iteration, Prompt, Running, begin_iteration, next_chunk, typical_context
from spear_jax.models.decoder import Decoder

MAX_STOPS = 16
"""Stop tokens of a request that the device looks for; the host sees the others, a call later."""

_NEVER = -1
"""A token that is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop decides: at most `passes` chunks and decode steps a call, and what the scheduler goes by."""

    passes: int
    stall_tokens: int
    table: LatencyTable | None = None
    share: float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """What the loop knows of S slots besides their `DeviceState`; donated in each call.

    int32 `prompt` [S, T] holds their prompts, `left` [S] counts the tokens of them that are not in the cache yet,
    `origin` [S] those that were when they came, `answered` [S] those at the end that had been generated before;
    `remaining` [S] are to be generated; `stop` [S, MAX_STOPS] end an answer. bool `droppable` [S]. `running` is what
    the policy sees, with times from the beginning of the last call; `so_far` what it has decided of an iteration;
    `ends` counts the answers that have ended.
    """

    prompt: Any
    left: Any
    origin: Any
    answered: Any
    remaining: Any
    stop: Any
    droppable: Any
    running: Running
    so_far: Iteration
    ends: Any

    @classmethod
    def empty(cls, *, slots: int, length: int) -> "Slots":
        """Make idle slots, with room for prompts of `length` tokens, chunks' padding included."""
        none, zeros = jnp.zeros(slots, bool), jnp.zeros(slots, jnp.float32)
        never, zero = jnp.full(slots, UNBOUNDED, jnp.float32), jnp.zeros((), jnp.float32)
        return cls(
            prompt=jnp.zeros((slots, length), jnp.int32),
            left=jnp.zeros(slots, jnp.int32),
            origin=jnp.zeros(slots, jnp.int32),
            answered=jnp.zeros(slots, jnp.int32),
            remaining=jnp.zeros(slots, jnp.int32),
            stop=jnp.full((slots, MAX_STOPS), _NEVER, jnp.int32),
            droppable=none,
            running=Running(decoding=none, context=zeros, itl=never, tpot=never, first=zeros, generated=zeros),
            so_far=Iteration(
                run=none, tokens=zero, seconds=zero, budget=zero, room=jnp.int32(0), open=jnp.zeros((), bool)
            ),
            ends=jnp.int32(0),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What the host tells a call. `passes`: chunks and steps that it may run.

    `waiting`: a request could be let in once an answer ends, so that the call returns then, and after its first pass
    if `ends` is not what the device counts: an answer ended of which the host did not know. float32 `elapsed` is the
    time since the last call, `drift` the factor on the table. int32 [S]: prompts go in the order of `rank`; bool [S]:
    `urgent` and `overdue` as in `Prompt`; whatever is in slots of `drop` is forgotten.
    """

    passes: Any
    waiting: Any
    ends: Any
    elapsed: Any
    drift: Any
    rank: Any
    urgent: Any
    overdue: Any
    drop: Any

    @classmethod
    def of(
        cls, *, slots: int, drop: Bool[np.ndarray, " S"], passes: int = 1, waiting: bool = False, ends: int = 0,
        elapsed: float = 0.0, drift: float = 1.0, prompts: Sequence[Prompt] = (),
    ) -> "Call":  # fmt: skip
        """Make one, with prompts in the order they are to go, as numpy arrays."""
        rank, urgent, overdue = np.zeros(slots, np.int32), np.zeros(slots, bool), np.zeros(slots, bool)
        for i, prompt in enumerate(prompts):
            rank[prompt.slot], urgent[prompt.slot], overdue[prompt.slot] = i, prompt.urgent, prompt.overdue
        return cls(
            passes=np.int32(passes), waiting=np.bool_(waiting), ends=np.int32(ends), elapsed=np.float32(elapsed),
            drift=np.float32(drift), rank=rank, urgent=urgent, overdue=overdue, drop=drop,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """What a call did, one row a pass: int `tokens` [passes, S], negative where a slot got none.

    `chunks` [passes, 4] tells slot, length (0 for a decode step) and set of compensators of a chunk, and how many could
    have decoded and did not. `ends` answers have ended since the start; the table, without drift, has `predicted`
    seconds for it all.
    """

    tokens: list[list[int]]
    chunks: list[list[int]]
    ends: int
    predicted: float

    @classmethod
    def of(cls, packed: ArrayLike) -> "Ring":
        """Read what a call gives, int32 [P + 1, 4 + S]: rows of `chunks` and `tokens`, and one of the rest.

        One array, as fetching one takes the host 0.1 ms. Waits for the call.
        """
        *rows, last = np.asarray(packed)
        rows = np.stack(rows[: last[0]]).reshape(last[0], -1).tolist() if last[0] else []
        return cls(
            tokens=[row[4:] for row in rows],
            chunks=[row[:4] for row in rows],
            ends=int(last[1]),
            predicted=float(last[2:3].view(np.float32)[0]),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Newcomer:
    """A request as it enters a slot, as numpy arrays.

    int32 `numbers`: slot, prompt tokens, those of them that are in the cache, those at the end that were generated
    before, tokens to generate. The rest as in `Slots`, for one: `times` are its `itl`, its `tpot`, and when its first
    token came, if one did.
    """

    numbers: Any
    prompt: Any
    stop: Any
    droppable: Any
    times: Any
    sampling: SamplingState

    @classmethod
    def of(
        cls, request: Request, *, slot: int, slo: Slo, length: int, cached: int = 0, answer: Sequence[int] = (),
        since: float = 0.0,
    ) -> "Newcomer":  # fmt: skip
        """Lay a request, held to `slo`, out for slots with room for `length` tokens.

        The first `cached` tokens are in the slot's pages; `answer` was generated before the request lost a slot, and
        its first token came `since` seconds after the last call began.
        """
        prompt, params = [*request.prompt, *answer], request.params
        padded, stop = np.zeros(length, np.int32), np.full(MAX_STOPS, _NEVER, np.int32)
        padded[: len(prompt)] = prompt
        # What is drawn here of a constrained answer is drawn again, and may not be its end.
        ids = [] if params.constrained else sorted(params.stop_token_ids)[:MAX_STOPS]
        stop[: len(ids)] = ids
        return cls(
            numbers=np.array([slot, len(prompt), cached, len(answer), params.max_tokens - len(answer)], np.int32),
            prompt=padded,
            stop=stop,
            droppable=np.bool_(request.droppable),
            times=np.array([slo.itl, slo.tpot, since], np.float32),
            sampling=SamplingState.of([params]),
        )


def stage(model: Decoder, logits: Logits, state: DeviceState, new: Newcomer) -> tuple[Array, DeviceState]:
    """Put a request into a slot, in the place of whatever was there; gives the slot."""
    del model, logits
    slots: Slots = state.slots
    slot, tokens, cached, answered, remaining = new.numbers
    own = functools.partial(_with, slot)
    running = dataclasses.replace(
        slots.running,
        decoding=own(slots.running.decoding, False),
        itl=own(slots.running.itl, new.times[0]),
        tpot=own(slots.running.tpot, new.times[1]),
        first=own(slots.running.first, new.times[2]),
        generated=own(slots.running.generated, answered.astype(jnp.float32)),
    )
    slots = dataclasses.replace(
        slots,
        prompt=own(slots.prompt, new.prompt),
        left=own(slots.left, tokens - cached),
        origin=own(slots.origin, cached),
        answered=own(slots.answered, answered),
        remaining=own(slots.remaining, remaining),
        stop=own(slots.stop, new.stop),
        droppable=own(slots.droppable, new.droppable),
        running=running,
    )
    sampling = jax.tree.map(lambda old, one: own(old, one[0]), state.sampling, new.sampling)
    return slot, dataclasses.replace(state, length=own(state.length, cached), sampling=sampling, slots=slots)


def _with(slot: Array, array: Array, value: Any) -> Array:
    return array.at[slot].set(value)


def serve_loop(
    model: Decoder,
    logits: Logits,
    state: DeviceState,
    call: Call,
    *,
    settings: LoopSettings,
    buckets: Sequence[int],
    kept: Sequence[Sequence[str]],
    lone: bool,
) -> tuple[Int[Array, "P C"], DeviceState]:
    """Run up to `call.passes` chunks and decode steps; come back early at a first or a last token.

    An iteration of the scheduler is chunks, each a pass, and a decode step; it may go on in the next call. With `lone`
    a single sequence decodes by a program of its own. `Ring.of` reads what was done.
    """
    sizes, share = jnp.asarray(buckets, jnp.int32), settings.share
    table = settings.table
    if table is not None:
        table = jax.tree.map(lambda axis: jnp.asarray(axis, jnp.float32), table).scaled(call.drift)
    programs = _programs(model, logits, buckets=buckets, kept=kept, lone=lone)
    first_chunk = 3 if lone else 2

    def choose(state: DeviceState, slots: Slots, now: Array) -> tuple[Any, ...]:
        """Give a pass: its program, length and set of its chunk, the iteration then, its seconds, who may decode."""
        running = dataclasses.replace(slots.running, context=state.length.astype(jnp.float32))
        decoding, so_far = running.decoding, slots.so_far
        room = jnp.where(jnp.any(decoding), settings.stall_tokens, sizes[-1])
        fresh = begin_iteration(running, now=now, share=share, room=room)
        goes_on = so_far.open | jnp.any(so_far.run & decoding)
        so_far = jax.tree.map(lambda old, new: jnp.where(goes_on, old, new), so_far, fresh)
        slot = _next_slot(slots, call)
        prompt = Prompt(
            slot=slot, start=state.length[slot], left=slots.left[slot], droppable=slots.droppable[slot],
            limit=jnp.minimum(running.itl, running.tpot)[slot], urgent=call.urgent[slot], overdue=call.overdue[slot],
        )  # fmt: skip
        length, index, level, after = next_chunk(table, sizes, running, so_far, prompt, now=now, share=share)
        chunk = (index >= 0) & (prompt.left > 0)
        run = so_far.run & decoding
        count = jnp.sum(run)
        step = jnp.where(count > 0, jnp.where((count == 1) & lone, 2, 1), 0)
        which = jnp.where(level > 0, len(buckets) + level - 1, index) + first_chunk
        seconds = jnp.float32(0)
        if table is not None:
            typical = typical_context(table, running.context, run)
            seconds = jnp.where(chunk, after.seconds - so_far.seconds, table.at(count, typical)[0, 0])
        done = dataclasses.replace(so_far, run=jnp.zeros_like(run), open=jnp.zeros((), bool))
        chosen = jax.tree.map(lambda one, other: jnp.where(chunk, one, other), after, done)
        return jnp.where(chunk, which, step), length, level, chosen, seconds, run

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        done, now, _, ring, state, slots = carry
        program, length, level, so_far, seconds, run = choose(state, slots, now)
        slot, chunk = _next_slot(slots, call), program >= first_chunk
        length = jnp.where(chunk, length, 0)
        last = chunk & (length == slots.left[slot])
        drawn, state = jax.lax.switch(program, programs, state, slots, slot, length, last, run)
        now = now + seconds
        got = drawn >= 0
        ended = got & ((slots.remaining <= 1) | jnp.any(drawn[:, None] == slots.stop, axis=1))
        running = slots.running
        skipped = jnp.where(chunk | (program == 0), 0, jnp.sum(running.decoding & ~run))
        running = dataclasses.replace(
            running,
            decoding=(running.decoding | got) & ~ended,
            first=jnp.where(got & (running.generated == 0), now, running.first),
            generated=running.generated + got.astype(jnp.float32),
        )
        slots = dataclasses.replace(
            slots, left=slots.left.at[slot].add(-length), remaining=slots.remaining - got.astype(jnp.int32),
            running=running, so_far=so_far, ends=slots.ends + jnp.sum(ended),
        )  # fmt: skip
        told = jnp.stack([slot, length, level.astype(jnp.int32), skipped])
        ring = ring.at[done].set(jnp.concatenate([told, drawn]))
        return done + 1, now, last | jnp.any(ended), ring, state, slots

    def goes_on(carry: tuple[Any, ...]) -> Array:
        done, _, event, _, _, slots = carry
        busy = jnp.any(slots.running.decoding) | jnp.any(slots.left > 0)
        more = (done < call.passes) & ~event & ~(call.waiting & (slots.ends != call.ends))
        return busy & ((done == 0) | more)

    slots: Slots = state.slots
    running = dataclasses.replace(
        slots.running,
        decoding=slots.running.decoding & ~call.drop,
        first=slots.running.first - call.elapsed,
    )
    slots = dataclasses.replace(slots, left=jnp.where(call.drop, 0, slots.left), running=running)
    ring = jnp.zeros((settings.passes + 1, 4 + slots.left.shape[0]), jnp.int32)
    start = (jnp.int32(0), jnp.float32(0), jnp.zeros((), bool), ring, dataclasses.replace(state, slots=None), slots)
    done, now, _, ring, state, slots = jax.lax.while_loop(goes_on, body, start)
    predicted = jax.lax.bitcast_convert_type(now / call.drift, jnp.int32)
    ring = ring.at[-1, :3].set(jnp.stack([done, slots.ends, predicted]))
    return ring, dataclasses.replace(state, slots=slots)


def _next_slot(slots: Slots, call: Call) -> Array:
    """Give the slot whose prompt is next; any one if there is none."""
    return jnp.argmin(jnp.where(slots.left > 0, call.rank, jnp.iinfo(jnp.int32).max)).astype(jnp.int32)


def _programs(
    model: Decoder, logits: Logits, *, buckets: Sequence[int], kept: Sequence[Sequence[str]], lone: bool
) -> list[Callable[..., tuple[Array, DeviceState]]]:
    """Give what a pass may be: nothing, a decode step, with `lone` one of a single row, and a chunk of each kind.

    All take (state, slots, slot, length, last, run) and give the new token of each slot, negative where there is none.
    """

    def nothing(state: DeviceState, *_: Array) -> tuple[Array, DeviceState]:
        return jnp.full(state.token.shape, _NEVER, jnp.int32), state

    def decode(state: DeviceState, slots: Slots, slot: Array, length: Array, last: Array, run: Array):
        token, state = decode_step(model, logits, state, run)
        return jnp.where(run, token, _NEVER), state

    def decode_one(state: DeviceState, slots: Slots, slot: Array, length: Array, last: Array, run: Array):
        token, state = decode_lone(model, logits, state, jnp.argmax(run).astype(jnp.int32))
        return jnp.where(run, token, _NEVER), state

    def chunk(
        names: Sequence[str] | None, bucket: int, state: DeviceState, slots: Slots, slot: Array, length: Array,
        last: Array, run: Array,
    ):  # fmt: skip
        start = state.length[slot]
        part = jax.lax.dynamic_slice_in_dim(slots.prompt[slot], start, bucket)[None]
        params = jax.tree.map(lambda leaf: leaf[slot][None], state.sampling)
        first, new = start == slots.origin[slot], start + slots.left[slot] - slots.answered[slot]
        answered = jnp.clip(start + length - new, 0, length)
        place = jnp.stack([slot, start, length, last.astype(jnp.int32), first.astype(jnp.int32), answered])
        lighter = model if names is None else with_compensators_of(model, names)
        token, state = prefill_step(lighter, logits, state, part, place, params)
        here = last & (jnp.arange(run.shape[0]) == slot)
        return jnp.where(here, token, _NEVER), state

    chunks = [functools.partial(chunk, None, bucket) for bucket in buckets]
    chunks += [functools.partial(chunk, names, buckets[0]) for names in kept[1:]]
    return [nothing, decode, *([decode_one] if lone else []), *chunks]


class LoopRunner(Runner):
    """A runner whose device chooses what to do: `stage` brings requests, `advance` starts a call of the loop.

    Both return at once. Step by step nothing can be run.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        settings: LoopSettings,
        context: int,
        lone_program: bool,
        mesh: Mesh | None = None,
        kept: Sequence[Sequence[str]] = (),
        **options: Any,
    ):
        super().__init__(model, context=context, lone_program=lone_program, mesh=mesh, **options)
        self.passes = settings.passes
        self._length = context + self.buckets[-1]

        # Jitted, as each array must be one of its own to be donated.
        empty = jax.jit(functools.partial(self._empty_slots, mesh))
        whole, place = self._idle_state, self._state.length.sharding
        self._idle_state = lambda: dataclasses.replace(whole(), slots=jax.device_put(empty(), place))
        self._state = dataclasses.replace(self._state, slots=jax.device_put(empty(), place))
        loop = functools.partial(
            serve_loop, settings=settings, buckets=self.buckets, kept=kept, lone=lone_program and self.slots > 1
        )
        self._loop = self._compiled(functools.update_wrapper(loop, serve_loop))
        self._stage = self._compiled(stage)

    def _empty_slots(self, mesh: Mesh | None) -> Slots:
        slots = Slots.empty(slots=self.slots, length=self._length)
        return slots if mesh is None else jax.tree.map(lambda leaf: jnp.stack([leaf] * mesh.size), slots)

    def stage(self, request: Request, slot: int, *, slo: Slo, **before: Any) -> None:
        """Put a request, held to `slo`, into a slot; with what was `before`, as in `Newcomer.of`."""
        new = Newcomer.of(request, slot=slot, slo=slo, length=self._length, **before)
        _, self._state = self._stage(self._leaves, self._state, new)

    def advance(self, call: Call) -> Int[Array, "P C"]:
        """Run up to `call.passes` chunks and steps of those who are in slots; `Ring.of` reads what was done.

        Raises:
            PeerLostError: About once a second it is looked whether a device waited in vain for another one.
        """
        self.check_sometimes()
        ring, self._state = self._loop(self._leaves, self._state, call)
        return ring

    def _programs(self) -> list[tuple[str, Any, list[Array], tuple[Any, ...]]]:
        nobody = Request(id="", prompt=(0,), params=SamplingParams(max_tokens=1, temperature=0.0))
        stage = Newcomer.of(nobody, slot=0, slo=nobody.slo, length=self._length)
        call = Call.of(slots=self.slots, drop=np.ones(self.slots, bool))
        return [
            ("stage", self._stage, self._leaves, (stage,)),
            ("loop", self._loop, self._leaves, (call,)),
            *self._judging(),
        ]
