"""The device side of the engine: jitted prefill and decode steps over donated state."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int, Int32, UInt32

from pallas_kernels.peer_reduce import PeerLostError, empty_inbox
from serve.cache import (
    Cache,
    KVCache,
    allocate,
    batch_attend,
    last_position,
    slot_attend,
    whole_table,
    with_table,
)
from serve.pages import pages_for
from serve.request import SamplingParams
from serve.sampling import Logprobs, SamplingState, likeliest, log_probabilities, sample, with_prompt
from spear_jax.models.decoder import Decoder
from spear_jax.models.quantize import weight_bytes
from spear_jax.nn.row_parallel import MOST_ROWS, PeerCache
from spear_jax.sharding import OWN, SAME, of_parts, same_everywhere, sums_by_inbox

_CHECK_SECONDS = 1.0
"""How often the runner looks whether a device was lost, which waits for the steps that run."""

_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)

_SCORED_ROWS = 64
"""Tokens of a prompt that are judged at a time: their logits take 33 MB for a vocabulary of 128k."""

type Logits = Callable[[Decoder, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What a step reads and replaces, donated each time.

    `token` [S] is the last token of each slot, not yet in the cache; `hidden` [S, D] is what the last step chose it
    from; `chunk` [P, D] holds the same for each token of the last piece of a prompt, P being the largest; `length` [S]
    counts those in the cache; `history` [S, V] is what penalties go by. `table` [S, M] has the pages of each slot.
    `slots` is there where `serve.loop` chooses what is done.
    """

    cache: Cache | tuple[Cache, ...] | PeerCache
    table: Any
    token: Any
    hidden: Any
    chunk: Any
    length: Any
    sampling: SamplingState
    history: Any
    slots: Any = None


class Runner:
    """Holds a model and the state of S slots on the device, and enqueues steps; owned by one thread.

    Calls return at once with device arrays. The model's arrays are flattened once: flattening the module tree on every
    call would cost more Python than the rest of a step. A lone request decodes in a program of its own that reads one
    slot; otherwise all S slots run, so what a request gets does not depend on which others are there.

    What log-probabilities need, of answers or of prompts, is a second look at the head by a program of its own: who
    does not ask pays nothing. So is what holds answers to a grammar: it draws again from what a step left.

    With `greedy_program` steps in which all are greedy run in a program that has no branch for it: on a GPU launches
    follow one another without the host waiting for the device's choice. `steps_per_call` steps of decoding run in one
    program, for measuring: what they give but the last is lost.

    With a `mesh` the model is the parts of its devices side by side (`spear_jax.sharding.divide`), and so is the state.
    Inboxes, where sums go through such, are in it: made and in place before the first program, and donated with it.

    A chunk of `level` e > 0 goes through a model with the compensators of the modules `kept[e]` only, and must be of
    the smallest bucket.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int,
        context: int,
        buckets: Sequence[int],
        lone_program: bool,
        pages: int | None = None,
        int8_cache: bool = False,
        greedy_program: bool = False,
        steps_per_call: int = 1,
        logits: Logits = Decoder.logits,
        compiler_options: Mapping[str, str] | None = None,
        mesh: Mesh | None = None,
        kept: Sequence[Sequence[str]] = (),
    ):
        self.slots = slots
        self.buckets = tuple(sorted(buckets))
        leaves, tree = jax.tree.flatten(model)
        self._leaves: list[Array] = _committed(leaves)
        sizes = {"slots": slots, "context": context, "padding": self.buckets[-1], "pages": pages, "int8": int8_cache}
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)  # not its arrays

        def idle() -> DeviceState:
            state = empty_state(shapes, **sizes) if mesh is None else _state_of_parts(shapes, mesh, **sizes)
            return _committed(jax.block_until_ready(state))

        self._idle_state = idle
        self._state: DeviceState = idle()
        self.pages = 1 + slots * pages_for(context) if pages is None else pages
        self._first_table = whole_table(slots=slots, context=context, padding=self.buckets[-1], pages=self.pages)
        self.table_shape: tuple[int, int] = self._first_table.shape
        self._renumber = jax.jit(_renumbered, donate_argnums=0, out_shardings=self._state.table.sharding)
        self._mesh, self._checked = mesh, time.monotonic()
        jit = functools.partial(_jit, logits=logits, options=compiler_options, mesh=mesh)
        self._compiled = compiled = functools.partial(jit, tree)
        self._prefill = compiled(prefill_step)
        self._decode_all = compiled(_repeated(decode_step, steps_per_call))
        self._decode_greedy = compiled(_repeated(greedy_step, steps_per_call)) if greedy_program else None
        self._decode_one = compiled(decode_lone) if lone_program and slots > 1 else None
        self._logprobs_all = compiled(all_logprobs)
        self._logprobs_one = compiled(_one_logprobs) if lone_program and slots > 1 else None
        self._prompt_logprobs = compiled(prompt_logprobs)
        self._redraw = compiled(redraw)
        self.mask_words = -(-model.config.vocab_size // 32)
        self._special = np.zeros(slots, bool)
        self._active = np.ones(slots, bool), self._everywhere(np.ones(slots, bool))
        self._tree, self._kept = tree, kept[1:]
        lighter = [self._with_compensators(model, names) for names in self._kept]
        self._lighter = [(jit(tree, prefill_step), leaves) for leaves, tree in lighter]

    @property
    def num_programs(self) -> int:
        """How many programs `warm_up` compiles."""
        return len(self._programs())

    @property
    def in_pages(self) -> bool:
        """Whether attention costs what each sequence holds, rather than what the longest does."""
        cache = self._state.cache
        cache = cache.cache if isinstance(cache, PeerCache) else cache
        return not isinstance(cache[0] if isinstance(cache, tuple) else cache, KVCache)

    def use_table(self, table: Int32[np.ndarray, "S M"]) -> None:
        """Give every slot its pages, from the next call on; 0 is the page that nobody owns."""
        self._state = dataclasses.replace(self._state, table=self._renumber(self._state.table, table.copy()))

    def temporary_bytes(self) -> int:
        """Compile the programs that need most memory beside the state; give what they need on a device."""
        chunk = self._prefill_arguments(
            [0] * self.buckets[-1], slot=0, start=0, bucket=self.buckets[-1], last=True, params=_GREEDY
        )
        programs = ((self._prefill, chunk), (self._decode_all, (self._active[1],)), (self._logprobs_all, ()))
        state, leaves = _shapes(self._state), _shapes(self._leaves)
        memory = [program.lower(leaves, state, *rest).compile().memory_analysis() for program, rest in programs]
        return max(one.temp_size_in_bytes + one.output_size_in_bytes - one.alias_size_in_bytes for one in memory)

    def pretend(self, length: int) -> None:
        """Say that every slot holds `length` tokens, whatever is in the cache: for measuring."""
        held = self._state.length
        self._state = dataclasses.replace(
            self._state, length=jax.device_put(np.full(held.shape, length, np.int32), held.sharding)
        )

    def prefill(
        self,
        tokens: Sequence[int],
        *,
        slot: int,
        start: int,
        bucket: int,
        last: bool,
        params: SamplingParams,
        level: int = 0,
        first: bool | None = None,
        answered: int = 0,
    ) -> Int[Array, ""]:
        """Run `tokens` of a prompt from position `start` in a slot; with `last`, the result is the first new token.

        The `first` chunk of a request, by default the one at 0, begins the slot's history anew; where what is before it
        is in the cache already, history does not know of it. The last `answered` tokens count as generated.
        """
        self._special[slot] = not params.plain
        place = {"slot": slot, "start": start, "first": start == 0 if first is None else first, "answered": answered}
        arguments = self._prefill_arguments(tokens, bucket=bucket, last=last, params=params, **place)
        program, leaves = self._lighter[level - 1] if level else (self._prefill, self._leaves)
        token, self._state = program(leaves, self._state, *arguments)
        return token

    @staticmethod
    def _with_compensators(model: Decoder, names: Sequence[str]) -> tuple[list[Array], Any]:
        """Give the arrays and the tree of a model that keeps the compensators of some modules only."""
        leaves, tree = jax.tree.flatten(with_compensators_of(model, names))
        return _committed(leaves), tree

    def replacement(self, model: Decoder) -> list[list[Array]]:
        """Give the arrays of a model that the programs of this one can run, for `swap`; from any thread.

        Raises:
            ValueError: They cannot: says what differs.
        """
        leaves, tree = jax.tree.flatten(model)
        if tree != self._tree:
            raise ValueError("the model has another structure: architecture, quantization, or ranks of compensators")
        for old, new in zip(self._leaves, leaves, strict=True):
            if (old.shape, old.dtype, old.sharding) != (new.shape, new.dtype, new.sharding):
                raise ValueError(f"an array is {new.dtype}{[*new.shape]} where {old.dtype}{[*old.shape]} is served")
        return [_committed(leaves), *(self._with_compensators(model, names)[0] for names in self._kept)]

    def swap(self, replacement: list[list[Array]]) -> None:
        """Run the steps to come with other arrays, from `replacement`; what the cache holds stays as it is."""
        self._leaves, *others = replacement
        self._lighter = [(program, leaves) for (program, _), leaves in zip(self._lighter, others, strict=True)]

    @staticmethod
    def _prefill_arguments(
        tokens: Sequence[int],
        *,
        slot: int,
        start: int,
        bucket: int,
        last: bool,
        params: SamplingParams,
        first: bool = True,
        answered: int = 0,
    ) -> tuple[Any, ...]:
        padded = np.zeros((1, bucket), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded, np.array([slot, start, len(tokens), last, first, answered], np.int32), SamplingState.of([params])

    def decode(self, active: Bool[np.ndarray, " S"]) -> Int[Array, " S"]:
        """Give every active slot its next token; other entries mean nothing.

        Raises:
            PeerLostError: About once a second it is looked whether a device waited in vain for another one.
        """
        self.check_sometimes()
        if self._decode_one is not None and active.sum() == 1:
            token, self._state = self._decode_one(self._leaves, self._state, np.int32(active.argmax()))
            return token
        if not np.array_equal(active, self._active[0]):
            # Kept: with arguments that stay where they are XLA need not change its CUDA graphs.
            active = active.copy()
            self._active = active, self._everywhere(active)
        special = (self._special & active).any()
        program = self._decode_all if special or self._decode_greedy is None else self._decode_greedy
        token, self._state = program(self._leaves, self._state, self._active[1])
        return token

    def logprobs(self, wanted: Bool[np.ndarray, " S"]) -> Logprobs:
        """Judge the tokens that the wanted slots got last, and the likeliest there; other entries mean nothing."""
        if self._logprobs_one is not None and wanted.sum() == 1:
            found, self._state = self._logprobs_one(self._leaves, self._state, np.int32(wanted.argmax()))
        else:
            found, self._state = self._logprobs_all(self._leaves, self._state)
        return found

    def recover(self, error: Exception) -> None:
        """Give up the state, of which nothing is known after a call has failed, and make that of idle slots anew.

        Raises:
            PeerLostError: That was the error: the devices cannot go on together.
        """
        if isinstance(error, PeerLostError):
            raise error
        del self._state  # there is no memory for two
        self._state = self._idle_state()

    def check_sometimes(self) -> None:
        """Do what `check` does if a second has passed."""
        if time.monotonic() - self._checked > _CHECK_SECONDS:
            self.check()

    def prompt_logprobs(self, tokens: Sequence[int], *, bucket: int) -> Logprobs:
        """Judge what follows each token of the piece of a prompt that ran last; entries past `tokens` mean nothing."""
        padded = np.zeros(bucket, np.int32)
        padded[: len(tokens)] = tokens
        found, self._state = self._prompt_logprobs(self._leaves, self._state, padded)
        return found

    def redraw(self, wanted: Bool[np.ndarray, " S"], mask: UInt32[np.ndarray, "S W"]) -> Int[Array, " S"]:
        """Draw the last tokens of the wanted slots anew, each among those whose bits are set; gives those of all slots.

        Bit i % 32 of word i // 32 is token i's, in `mask_words` words. The tokens must have come from programs that
        count them: ask for them with `SamplingParams.constrained`.
        """
        token, self._state = self._redraw(self._leaves, self._state, wanted, mask)
        return token

    def check(self) -> None:
        """Wait for the steps that run, and raise where a device was lost.

        Raises:
            PeerLostError: Names the kernel and the devices.
        """
        self._checked = time.monotonic()
        if isinstance(self._state.cache, PeerCache):
            self._state.cache.inbox.check()

    def _everywhere(self, array: np.ndarray) -> Array:
        return jax.device_put(array) if self._mesh is None else same_everywhere(array, self._mesh)

    def _programs(self) -> list[tuple[str, Any, list[Array], tuple[Any, ...]]]:
        """Give every program by name, with the arrays of its model and the arguments to warm it up with."""
        programs: list[tuple[str, Any, list[Array], tuple[Any, ...]]] = []

        def add_prefill(name: str, program: Any, leaves: list[Array], bucket: int) -> None:
            chunk = self._prefill_arguments([0] * bucket, slot=0, start=0, bucket=bucket, last=True, params=_GREEDY)
            programs.append((f"prefill {bucket}{name}", program, leaves, chunk))

        for bucket in self.buckets:
            add_prefill("", self._prefill, self._leaves, bucket)
        for level, (program, leaves) in enumerate(self._lighter, 1):
            add_prefill(f" with compensators {level}", program, leaves, self.buckets[0])
        if self._decode_one is not None:
            programs.append(("decode 1", self._decode_one, self._leaves, (np.int32(0),)))
        if self._decode_greedy is not None:
            programs.append((f"greedy {self.slots}", self._decode_greedy, self._leaves, (self._active[1],)))
        programs.append((f"decode {self.slots}", self._decode_all, self._leaves, (self._active[1],)))
        return programs + self._judging()

    def _judging(self) -> list[tuple[str, Any, list[Array], tuple[Any, ...]]]:
        programs: list[tuple[str, Any, list[Array], tuple[Any, ...]]] = []
        if self._logprobs_one is not None:
            programs.append(("logprobs 1", self._logprobs_one, self._leaves, (np.int32(0),)))
        programs.append((f"logprobs {self.slots}", self._logprobs_all, self._leaves, ()))
        for bucket in self.buckets:
            scored = np.zeros(bucket, np.int32)
            programs.append((f"prompt logprobs {bucket}", self._prompt_logprobs, self._leaves, (scored,)))
        everything = np.full((self.slots, self.mask_words), 2**32 - 1, np.uint32)
        programs.append((f"redraw {self.slots}", self._redraw, self._leaves, (np.zeros(self.slots, bool), everything)))
        return programs

    def warm_up(self) -> Iterator[str]:
        """Compile every program, two at a time, and run it once; yield the name of each that is done.

        From a warm cache most of the time goes into reading programs back, which does not hold Python's lock.
        """
        programs = self._programs()

        state = _shapes(self._state)

        self.use_table(self._first_table)
        with ThreadPoolExecutor(max_workers=2) as pool:
            # A call finds what was compiled for the same function, shapes and placement.
            pending = [
                pool.submit(lambda f, x, a: f.lower(_shapes(x), state, *a).compile(), *rest) for _, *rest in programs
            ]
            if self._mesh is not None:
                # None runs while another is compiled: devices wait for each other, and compiling may make one wait.
                wait(pending)
            for (name, program, leaves, args), compiled in zip(programs, pending, strict=True):
                compiled.result()
                result, self._state = program(leaves, self._state, *args)
                jax.block_until_ready(result)
                yield name


def with_compensators_of(model: Decoder, names: Sequence[str]) -> Decoder:
    """Give a model that keeps the compensators of the named modules only."""
    kept = {name: bank for name, bank in model.compensators.items() if name in names}
    return model.replace(compensators=nnx.Dict(kept))


def empty_state(
    model: Decoder,
    *,
    slots: int,
    context: int,
    padding: int,
    pages: int | None = None,
    int8: bool = False,
    devices: int = 1,
) -> DeviceState:
    """Make the state of idle slots, for `context` tokens each at most, and `padding` past them for chunks.

    There are so many `pages`, one of them nobody's; by default as many as all slots can fill. In the table at first
    each slot has pages for its whole context; where there are too few for that they are shared.

    A part of a model that is divided over several devices gets what one of them holds.
    """
    stacked = not hasattr(model.layers, "__len__")
    pages = 1 + slots * pages_for(context) if pages is None else pages
    cache: Any = allocate(model.config, pages=pages, dtype=model.dtype, stacked=stacked, int8=int8)
    if sums_by_inbox(model):
        rows = min(MOST_ROWS, max(slots, padding))
        inbox = empty_inbox(devices=devices, rows=rows, columns=model.config.hidden_size)
        cache = PeerCache(cache=cache, inbox=inbox)
    return DeviceState(
        cache=cache,
        table=jnp.asarray(whole_table(slots=slots, context=context, padding=padding, pages=pages)),
        token=jnp.zeros(slots, jnp.int32),
        hidden=jnp.zeros((slots, model.config.hidden_size), model.dtype),
        chunk=jnp.zeros((padding, model.config.hidden_size), model.dtype),
        length=jnp.zeros(slots, jnp.int32),
        sampling=jax.tree.map(jnp.asarray, SamplingState.of([_GREEDY] * slots)),
        history=jnp.zeros((slots, model.config.vocab_size), jnp.int32),
    )


def cache_page_bytes(model: Decoder, *, int8: bool) -> int:
    """Give the bytes that a page of the KV cache takes on a device, in all layers together."""
    config, dtype, pages = model.config, model.dtype, 2
    cache = jax.eval_shape(lambda: allocate(config, pages=pages, dtype=dtype, stacked=True, int8=int8))
    return weight_bytes(cache) // pages


def _state_of_parts(model: Decoder, mesh: Mesh, **sizes: Any) -> DeviceState:
    """Make the states of all devices side by side, each where it belongs."""

    def build() -> DeviceState:
        state = empty_state(model, devices=mesh.size, **sizes)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (mesh.size, *leaf.shape)), state)

    return jax.jit(build, out_shardings=NamedSharding(mesh, OWN))()


def _shapes(arrays: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays)


def _committed(arrays: Any) -> Any:
    """Tie arrays to where they are.

    A program is compiled for committed or for uncommitted arguments. What a checkpoint restores is committed and what
    is made here is not: left so, each program would compile again when its arguments come from another program.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), arrays)


def _jit(
    tree: Any,
    step: Callable[..., tuple[Any, DeviceState]],
    *,
    logits: Logits,
    options: Mapping[str, str] | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Compile `step(model, logits, state, ...)` as a function of the model's arrays, with the state donated."""

    def of_arrays(leaves: list[Array], state: DeviceState, *args: Any) -> tuple[Any, DeviceState]:
        return step(jax.tree.unflatten(tree, leaves), logits, state, *args)

    run: Callable[..., Any] = functools.wraps(step)(of_arrays)
    settings: dict[str, Any] = {"donate_argnums": 1, "compiler_options": dict(options or {}) or None}
    if mesh is not None:
        # Said outright: an inbox must come back where it was.
        settings["out_shardings"] = (NamedSharding(mesh, SAME), NamedSharding(mesh, OWN))
        run = of_parts(run, mesh, own=2, gives=(SAME, OWN))
    return jax.jit(run, **settings)


def _renumbered(table: Int[Array, "*D S M"], new: Int[Array, "S M"]) -> Int[Array, "*D S M"]:
    """Write a table in the place of another: what XLA has of it in CUDA graphs stays where it is."""
    return jnp.where(new >= 0, new, table)


def _run(model: Decoder, state: DeviceState, tokens: Array, positions: Array, attend: Partial) -> tuple[Array, Any]:
    """Run the model with the pages of the state's table; give what it gives, the cache again without it."""
    hidden, cache = model(tokens, positions, attend=attend, cache=with_table(state.cache, state.table))
    return hidden, with_table(cache, None)


def prefill_step(
    model: Decoder,
    logits: Logits,
    state: DeviceState,
    tokens: Int[Array, "1 T"],
    place: Int[Array, "6"],
    params: SamplingState,
) -> tuple[Int[Array, ""], DeviceState]:
    """Run a piece of a prompt.

    `place` is its slot, its first position, its length, whether it is the prompt's last, whether it is the first that
    runs of it, and how many of its tokens were generated before.
    """
    slot, start, length, last, first, answered = place
    positions = (start + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None]
    hidden, cache = _run(model, state, tokens, positions, slot_attend(slot, positions))
    end = start + length
    history = with_prompt(state.history[slot], tokens[0], length, answered=answered, first=first > 0)
    final = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False)

    def first_token() -> Int[Array, "1"]:
        return sample(logits(model, final), params, end[None], history[None])

    token = jax.lax.cond(last > 0, first_token, lambda: jnp.zeros(1, jnp.int32))
    return token[0], dataclasses.replace(
        state,
        cache=cache,
        token=state.token.at[slot].set(token[0]),
        hidden=state.hidden.at[slot].set(final[0]),
        chunk=jax.lax.dynamic_update_slice(state.chunk, hidden[0], (0, 0)),
        length=state.length.at[slot].set(end),
        sampling=jax.tree.map(lambda old, new: old.at[slot].set(new[0]), state.sampling, params),
        history=state.history.at[slot].set(history.at[token[0]].add(last)),
    )


def decode_step(
    model: Decoder, logits: Logits, state: DeviceState, active: Bool[Array, " S"]
) -> tuple[Int[Array, " S"], DeviceState]:
    """Give each active slot its next token; other entries mean nothing."""
    sampling = state.sampling.active_only(active)
    token, state = _step(
        model, logits, state, active, lambda logits, position: sample(logits, sampling, position, state.history)
    )
    counted = state.history.at[jnp.arange(active.shape[0]), token].add(active.astype(jnp.int32))
    return token, dataclasses.replace(state, history=counted)


def greedy_step(
    model: Decoder, logits: Logits, state: DeviceState, active: Bool[Array, " S"]
) -> tuple[Int[Array, " S"], DeviceState]:
    """Give what `decode_step` does where no active slot draws at random or has its logits changed."""
    return _step(model, logits, state, active, lambda logits, _: likeliest(logits))


def _step(
    model: Decoder,
    logits: Logits,
    state: DeviceState,
    active: Bool[Array, " S"],
    choose: Callable[[Array, Array], Array],
) -> tuple[Int[Array, " S"], DeviceState]:
    positions = jnp.where(active, state.length, last_position(state.table))
    hidden, cache = _run(model, state, state.token[:, None], positions[:, None], batch_attend(positions, active))
    drawn = choose(logits(model, hidden[:, 0]), positions + 1)
    token = jnp.where(active, drawn, state.token)
    return token, dataclasses.replace(
        state, cache=cache, token=token, hidden=hidden[:, 0], length=state.length + active.astype(jnp.int32)
    )


def all_logprobs(model: Decoder, logits: Logits, state: DeviceState) -> tuple[Logprobs, DeviceState]:
    """Judge the last token of every slot; entries of slots without one from the last step mean nothing."""
    return log_probabilities(logits(model, state.hidden), state.token), state


def _one_logprobs(
    model: Decoder, logits: Logits, state: DeviceState, slot: Int[Array, ""]
) -> tuple[Logprobs, DeviceState]:
    one = log_probabilities(logits(model, state.hidden[slot][None]), state.token[slot][None])
    slots = state.token.shape[0]
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (slots, *leaf.shape[1:])), one), state


def redraw(
    model: Decoder, logits: Logits, state: DeviceState, wanted: Bool[Array, " S"], mask: UInt32[Array, "S W"]
) -> tuple[Int[Array, " S"], DeviceState]:
    """Draw the last tokens of the wanted slots anew, among those that a mask allows."""
    rows, taken_back = jnp.arange(wanted.shape[0]), wanted.astype(jnp.int32)
    history = state.history.at[rows, state.token].add(-taken_back)
    vocab = jnp.arange(state.history.shape[1])
    allowed = mask[:, vocab // 32] >> (vocab % 32).astype(jnp.uint32) & 1
    held = jnp.where(allowed == 1, logits(model, state.hidden), -jnp.inf)
    drawn = sample(held, state.sampling.active_only(wanted), state.length, history)
    token = jnp.where(wanted, drawn, state.token)
    return token, dataclasses.replace(state, token=token, history=history.at[rows, token].add(taken_back))


def prompt_logprobs(
    model: Decoder, logits: Logits, state: DeviceState, following: Int[Array, " T"]
) -> tuple[Logprobs, DeviceState]:
    """Judge the token that follows each one of the last piece of a prompt, a few rows of logits at a time."""
    rows = min(_SCORED_ROWS, following.shape[0])
    padding = -following.shape[0] % rows
    hidden = jnp.pad(state.chunk[: following.shape[0]], ((0, padding), (0, 0)))
    blocks = hidden.reshape(-1, rows, hidden.shape[1]), jnp.pad(following, (0, padding)).reshape(-1, rows)
    found = jax.lax.map(lambda block: log_probabilities(logits(model, block[0]), block[1]), blocks)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[: following.shape[0]], found), state


def _repeated(step: Callable[..., tuple[Array, DeviceState]], count: int) -> Callable[..., tuple[Array, DeviceState]]:
    """Give a step that does `count` of them in a loop on the device."""
    if count == 1:
        return step

    @functools.wraps(step)
    def steps(model: Decoder, logits: Logits, state: DeviceState, active: Array) -> tuple[Array, DeviceState]:
        state = jax.lax.fori_loop(0, count, lambda _, state: step(model, logits, state, active)[1], state)
        return state.token, state

    return steps


def decode_lone(
    model: Decoder, logits: Logits, state: DeviceState, slot: Int[Array, ""]
) -> tuple[Int[Array, " S"], DeviceState]:
    """Give the next token of one slot; the other entries are their last ones."""
    position = state.length[slot][None]
    where = position[:, None]
    hidden, cache = _run(model, state, state.token[slot][None, None], where, slot_attend(slot, where))
    params = jax.tree.map(lambda leaf: leaf[slot][None], state.sampling)
    drawn = sample(logits(model, hidden[:, 0]), params, position + 1, state.history[slot][None])[0]
    return state.token.at[slot].set(drawn), dataclasses.replace(
        state,
        cache=cache,
        token=state.token.at[slot].set(drawn),
        hidden=state.hidden.at[slot].set(hidden[0, 0]),
        length=state.length.at[slot].add(1),
        history=state.history.at[slot, drawn].add(1),
    )
