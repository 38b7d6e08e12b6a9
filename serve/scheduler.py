"""What runs next: pure functions of small arrays, numpy's or jax's, without a device.

The same code runs in the engine, in the simulator and inside a jitted program. Times are seconds. `serve.slots` keeps
the books and asks.
"""

import dataclasses
from typing import Any

import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from serve.latency import LatencyTable
from serve.request import UNBOUNDED

Either = Array | np.ndarray
"""An array of numpy or of jax; all of a call are of one kind."""


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """What the policy sees of S slots.

    `decoding` [S] tells which have a token to generate. As floats: `context` [S] their tokens in the cache; `itl` and
    `tpot` [S] what they may take; `first` [S] when the first token came; `generated` [S] how many did.
    """

    decoding: Any
    context: Any
    itl: Any
    tpot: Any
    first: Any
    generated: Any


def step_budget(running: Running, *, now: Any) -> Float[Either, ""]:
    """Give the seconds that the next iteration may take so that every decoding request gets its token in time.

    With `itl` that is the gap itself. With `tpot`, token j is due at `first + j tpot`, and a request that is behind
    still gets steps of its `tpot`, as shorter ones would only starve the prompts.
    """
    xp = running.itl.__array_namespace__()
    due = running.first + running.generated * running.tpot - now
    allowed = xp.minimum(running.itl, xp.maximum(due, running.tpot))
    return xp.min(xp.where(running.decoding, allowed, UNBOUNDED))


def must_run(running: Running, *, now: Any, seconds: Any) -> Bool[Either, " S"]:
    """Give who cannot skip an iteration of `seconds`.

    Source: AdaServe, `A = (elapsed + t) / TPOT - generated` tokens are owed after it; with A <= 0 a request may wait.
    """
    owed = (now + seconds - running.first) / running.tpot - (running.generated - 1)
    return running.decoding & ((owed > 0) | (running.itl < UNBOUNDED))


def choose_column(
    seconds: Float[Either, "E C"], *, budget: Any, droppable: Any
) -> tuple[Int[Either, ""], Int[Either, ""]]:
    """Give the largest chunk, as an index of C, that fits the budget, and the set of compensators, an index of E.

    Where not even the smallest fits with all compensators, it goes with the largest set that does. 0: no chunk.
    """
    xp = seconds.__array_namespace__()
    column = xp.searchsorted(seconds[0], budget, side="right") - 1
    level = xp.sum(seconds[:, 1] > budget)
    dropping = (column < 1) & (level < seconds.shape[0]) & droppable
    return xp.where(dropping, 1, xp.maximum(column, 0)), xp.where(dropping, level, 0)


def plan(
    table: LatencyTable, running: Running, *, budget: Any, start: Any, joins: Any, droppable: Any, urgent: Any, now: Any
) -> tuple[Bool[Either, " S"], Int[Either, ""], Int[Either, ""]]:
    """Give who decodes in this iteration, and column and set of the chunk of a prompt that goes on at `start`.

    All decode, unless the prompt is `urgent` and would get a larger chunk if those ahead of their TPOT waited. `joins`
    counts sequences that will decode in this iteration as their prompt ends; `budget` is in seconds.
    """
    xp = table.seconds.__array_namespace__()

    def choose(run: Bool[Either, " S"]) -> tuple[Either, Either, Either]:
        seconds = table.step(xp.sum(run) + joins, typical_context(table, running.context, run), start)
        return seconds, *choose_column(seconds, budget=budget, droppable=droppable)

    everyone = running.decoding
    seconds, column, level = choose(everyone)
    needed = must_run(running, now=now, seconds=seconds[0, 0])
    _, larger, other = choose(needed)
    skip = urgent & ((larger > column) | ((larger == column) & (other < level)))
    return xp.where(skip, needed, everyone), xp.where(skip, larger, column), xp.where(skip, other, level)


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """What is decided of an iteration so far: `run` [S] will decode, its chunks have `tokens` and take `seconds`.

    In all it may take `budget` seconds or, where these are not limited, `room` more tokens (padding included). It is
    `open` while another chunk may follow.
    """

    run: Any
    tokens: Any
    seconds: Any
    budget: Any
    room: Any
    open: Any


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt that is next: its slot, where it goes on, the tokens left, and the gap its answer allows, in seconds.

    `droppable`, `urgent` (late if it goes on at its pace) and `overdue` (it goes on whatever the limits) are booleans.
    """

    slot: Any
    start: Any
    left: Any
    limit: Any
    droppable: Any
    urgent: Any
    overdue: Any


def begin_iteration(running: Running, *, now: Any, share: Any, room: Any) -> Iteration:
    """Begin an iteration of all who decode, with room for so many prompt tokens where time is not limited."""
    budget = share * step_budget(running, now=now)
    none = running.itl.__array_namespace__().zeros_like(budget)
    return Iteration(run=running.decoding, tokens=none, seconds=none, budget=budget, room=room, open=none == 0)


def next_chunk(
    table: LatencyTable | None, buckets: Int[Either, " C"], running: Running, so_far: Iteration, prompt: Prompt, *,
    now: Any, share: Any,
) -> tuple[Int[Either, ""], Int[Either, ""], Int[Either, ""], Iteration]:  # fmt: skip
    """Give the next chunk: (tokens, index of the bucket, set of compensators), and the iteration with it.

    The index is -1 if there is none: the iteration ends with a decode step. Without limits on time, chunks are taken
    while there is room. With them the first is as large as `plan` says; others follow while there is time, unless they
    would bring fewer tokens a second than the iteration does without: each is a program of its own, and small ones are
    better left for later. A prompt whose last chunk this is sets a limit for the rest of the iteration, as its second
    token comes at its end.
    """
    xp = buckets.__array_namespace__()
    first = so_far.tokens == 0
    fitting = xp.searchsorted(buckets, so_far.room, side="right")
    column = xp.where(first & (so_far.room > 0), xp.maximum(fitting, 1), fitting)
    run, level, limited = so_far.run, xp.zeros_like(column), so_far.budget < share * UNBOUNDED
    if table is not None:
        planned, timed, other = plan(
            table, dataclasses.replace(running, decoding=run), budget=so_far.budget - so_far.seconds,
            start=prompt.start, joins=xp.where(prompt.left <= buckets[-1], 1, 0), droppable=first & prompt.droppable,
            urgent=first & prompt.urgent, now=now,
        )  # fmt: skip
        forced = first & prompt.overdue & (timed < 1)
        fewest = xp.where(prompt.droppable, table.seconds.shape[0] - 1, 0)
        column = xp.where(limited, xp.where(forced, 1, timed), column)
        level = xp.where(limited, xp.where(forced, fewest, other), level)
        run = xp.where(limited, planned, run)
    length, index = choose_chunk(prompt.left, buckets, largest=xp.maximum(column - 1, 0))
    goes, seconds = so_far.open & (column > 0), so_far.seconds
    tokens = xp.asarray(length, dtype=so_far.tokens.dtype)
    if table is not None:
        own = table.at(0, prompt.start)[level, index + 1]
        whole = seconds + table.at(xp.sum(run), typical_context(table, running.context, run))[0, 0]
        goes = goes & (first | ~limited | (tokens * whole >= own * so_far.tokens))
        seconds = seconds + own
    ends = length == prompt.left
    after = Iteration(
        run=run | (ends & (xp.arange(run.shape[0]) == prompt.slot)),
        tokens=so_far.tokens + tokens,
        seconds=seconds,
        budget=xp.where(ends, xp.minimum(so_far.budget, seconds + share * prompt.limit), so_far.budget),
        room=so_far.room - buckets[index],
        open=ends,
    )
    # Field by field: of numpy's arrays there is no tree of jax.
    kept = {f.name: xp.where(goes, getattr(after, f.name), getattr(so_far, f.name)) for f in dataclasses.fields(after)}
    return length, xp.where(goes, index, -1), level, Iteration(**kept)


def typical_context(table: LatencyTable, context: Float[Either, " S"], run: Bool[Either, " S"]) -> Float[Either, ""]:
    """Give the one context that stands for those of the sequences in `run`, as the table means it."""
    xp = table.seconds.__array_namespace__()
    own = xp.where(run, context, 0)
    return xp.max(own) if table.longest else xp.sum(own) / xp.maximum(xp.sum(xp.where(run, 1.0, 0.0)), 1.0)


def choose_chunk(
    remaining: Any, buckets: Int[Either, " C"], *, largest: Any
) -> tuple[Int[Either, ""], Int[Either, ""]]:
    """Give (tokens, index of the bucket) of the next chunk of a prompt with `remaining` tokens left.

    The whole rest goes into the smallest bucket that holds it when at least half of that bucket is used (or nothing
    smaller exists); else the largest full bucket goes first and the rest follows. `buckets` rise; none above index
    `largest` is used.
    """
    xp = buckets.__array_namespace__()
    holding = xp.searchsorted(buckets, remaining)
    full = xp.searchsorted(buckets, remaining, side="right") - 1
    size = buckets[xp.minimum(holding, buckets.shape[0] - 1)]
    whole = (holding <= largest) & ((2 * remaining >= size) | (full < 0))
    index = xp.where(whole, holding, xp.clip(full, 0, largest))
    return xp.minimum(remaining, buckets[index]), index


def queue_order(
    *,
    priority: Int[Either, " Q"],
    arrival: Float[Either, " Q"],
    deadline: Float[Either, " Q"],
    work: Float[Either, " Q"],
    begun: Bool[Either, " Q"],
    now: Any,
    aging: Any,
) -> Int[Either, " Q"]:
    """Order prompts by level, then least slack, then arrival; `work` is the seconds a prompt needs by itself.

    Those that have `begun`, as they hold a slot, go by their deadlines instead: by slack, which they lose only while
    they wait, they would take turns at every chunk, all to be through at their deadlines and not before.

    The level is the priority, one more for a deadline that cannot be met any more, so that a late one does not make the
    next late as well, and one less for every `aging` seconds of waiting, so that nothing waits for ever.
    """
    xp = arrival.__array_namespace__()
    slack = deadline - now - work
    level = priority + (slack < 0) - xp.floor((now - arrival) / aging)
    return xp.lexsort((arrival, xp.where(begun, deadline - now, slack), level))


def drop_order(score: Float[Either, " M"], seconds: Float[Either, " M"]) -> Int[Either, " M"]:
    """Order compensators by what they mend for the time they take, least first: the order to leave them out in."""
    xp = score.__array_namespace__()
    return xp.argsort(score / xp.maximum(seconds, 1e-9))


def first_token_times(
    tokens: Float[np.ndarray, " Q"], slot_free: Float[np.ndarray, " Q"], *, pace: float
) -> Float[np.ndarray, " Q"]:
    """Give the seconds until each prompt of a queue, in order, is through, at `pace` seconds a token.

    A prompt begins when the one before is through and its slot is free: `t_i = max(t_(i-1), slot_i) + tokens_i pace`.
    """
    done = np.cumsum(tokens * pace)
    return done + np.maximum.accumulate(slot_free - (done - tokens * pace))
