"""What a client asks of the engine, and what the engine answers; plain data without a device."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]


class BadParameterError(ValueError):
    """A value in a request that cannot be served; `param` names the field, `code` is OpenAI's word for the mistake."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(RuntimeError):
    """Raised at admission when as many requests wait as the server is configured to hold."""


class UnattainableError(RuntimeError):
    """Raised at admission when a request's limits on time cannot be kept; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDownError(RuntimeError):
    """Raised at admission once the server drains."""


class EngineDeadError(RuntimeError):
    """Raised at admission once the engine thread has failed."""


MAX_BIASES = 64
"""Tokens that one request may have in its `logit_bias`: so many are kept for each slot."""

MAX_LOGPROBS = 20
"""Likeliest tokens that can be asked for in the place of each one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Logits are changed first: those of tokens in prompt or answer by `repetition_penalty` (divided where positive, else
    multiplied), those of tokens in the answer by `frequency_penalty` for each time and `presence_penalty` once, and
    `logit_bias` is added. Then the filters apply in the order temperature, `min_p`, `top_k`, `top_p`; `temperature` 0
    is greedy and ignores them, `top_k` 0 keeps all. The same `seed` and prompt give the same tokens whatever else is
    being served. With `logprobs` each token comes with its log-probability and those of so many of the likeliest, with
    `prompt_logprobs` those of the prompt as well. `max_tokens` 0 generates nothing, which is of use with the latter.
    `constrained` answers are held to a grammar.

    Raises:
        BadParameterError: A value lies outside its range; names the OpenAI field.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constrained: bool = False

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, low=0.0, high=2.0)
        check_range("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        check_range("min_p", self.min_p, low=0.0, high=1.0)
        check_range("top_k", self.top_k, low=0, high=2**31 - 1)
        check_range("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        check_range("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        check_range("repetition_penalty", self.repetition_penalty, low=0.0, high=10.0, open_low=True)
        for _, bias in self.logit_bias:
            check_range("logit_bias", bias, low=-100.0, high=100.0)
        if len(self.logit_bias) > MAX_BIASES:
            raise BadParameterError(
                f"logit_bias holds {len(self.logit_bias)} tokens, at most {MAX_BIASES} are taken", param="logit_bias"
            )
        check_range("max_tokens", self.max_tokens, low=0, high=2**31 - 1)
        check_range("seed", self.seed, low=-(2**63), high=2**63 - 1)
        for count in (self.logprobs, self.prompt_logprobs):
            check_range("logprobs", count or 0, low=0, high=MAX_LOGPROBS)
        if not all(self.stop):
            raise BadParameterError("stop must not hold an empty string", param="stop")

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest by the model's own logits."""
        return self.temperature == 0 and not (self.penalized or self.logit_bias or self.constrained)

    @property
    def penalized(self) -> bool:
        """Whether logits depend on which tokens are in prompt and answer."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


def check_range(param: str, value: float, *, low: float, high: float, open_low: bool = False) -> None:
    """Refuse a value outside [low, high], or (low, high] with `open_low`.

    Raises:
        BadParameterError: It lies outside, or is not a number.
    """
    if not low <= value <= high or (open_low and value == low):  # so no comparison turns a huge integer into a float
        bracket = "(" if open_low else "["
        raise BadParameterError(f"{param} must lie in {bracket}{low}, {high}], got {value}", param=param)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """A token of an answer, its log-probability, those of the likeliest in its place, and where its text begins.

    `top` has pairs of token and log-probability, likeliest first; `offset` counts characters of the answer.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """A piece of an answer: new text, how many tokens it stands for, and on the last piece why it ended.

    `tokens` counts generated tokens including a stop token that has no text; on the last piece `uncompensated` counts
    prompt tokens that went without some of the error compensators, and `cached` those that were in the KV cache before.
    `error` is set when `finish_reason` is `error` or `abort`, `client_error` as well if the request is to blame;
    `retry_after`, in seconds, when that is because the request's limits cannot be kept now. `logprobs`, if asked for,
    are of the tokens whose text begins in this piece; on the last piece also of those that have no text.
    `prompt_logprobs`, if asked for, are on the first piece: of tokens of the prompt but the first, their `offset` 0.
    """

    text: str = ""
    tokens: int = 0
    uncompensated: int = 0
    cached: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    client_error: bool = False
    retry_after: float | None = None


def joined(pieces: Sequence[Output]) -> Output:
    """Give the pieces of an answer as one."""
    last = pieces[-1]
    return dataclasses.replace(
        last,
        text="".join(piece.text for piece in pieces),
        tokens=sum(piece.tokens for piece in pieces),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        prompt_logprobs=tuple(entry for piece in pieces for entry in piece.prompt_logprobs),
    )


UNBOUNDED = 1e9
"""Seconds that stand for no limit; finite, so that arithmetic with it is too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slo:
    """What a request may take, in seconds: to its first token, between any two tokens, and a token on average.

    `tpot` counts from the first token, so that a request ahead of it may wait; `itl` holds for every gap.
    """

    ttft: float = UNBOUNDED
    itl: float = UNBOUNDED
    tpot: float = UNBOUNDED

    @classmethod
    def of_milliseconds(cls, *, ttft: float | None, itl: float | None, tpot: float | None) -> "Slo":
        """Make one of settings in milliseconds, None for no limit."""
        given = {"ttft": ttft, "itl": itl, "tpot": tpot}
        return cls(**{name: value / 1e3 for name, value in given.items() if value is not None})

    @property
    def declared(self) -> bool:
        """Whether anything is asked for."""
        return min(self.ttft, self.itl, self.tpot) < UNBOUNDED

    def met(self, *, ttft: float, worst_gap: float, tpot: float) -> bool:
        """Say whether an answer kept it."""
        return ttft <= self.ttft and worst_gap <= self.itl and tpot <= self.tpot


class Grammar(Protocol):
    """Where an answer stands in what it is held to; the tokens that are allowed are the bits of an array of uint32."""

    def copy(self) -> "Grammar":
        """Give another at the same place."""
        ...

    def fill(self, mask: np.ndarray) -> None:
        """Write which tokens may come next; raises ValueError if it cannot tell."""
        ...

    def push(self, token: int) -> bool:
        """Add the next token, and say whether nothing can follow; raises ValueError if it is not allowed."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt on its way through the engine; compared by identity. `arrival` is `time.monotonic()` in seconds.

    Of two waiting requests the one of lower `priority` goes first. `droppable` allows prompt tokens without error
    compensators where the time between the tokens of others would be missed otherwise. An answer is held to a `grammar`
    from where that stands. `bare` ones are of the model without compensators, where it is served as well.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    slo: Slo = Slo()
    priority: int = 0
    droppable: bool = True
    grammar: Grammar | None = None
    bare: bool = False
    arrival: float = dataclasses.field(default_factory=time.monotonic)


class Admission:
    """Counts the requests inside the server and refuses more than `capacity`; thread-safe.

    A place is reserved before any work (tokenizing included) is done for a request, and given back when its answer
    ended or its client went away, so that a burst can never queue more than was promised.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """The number of places taken."""
        return self._held

    def reserve(self, count: int = 1) -> None:
        """Take `count` places, all or none.

        Raises:
            BadParameterError: More places than the server has; waiting would not help.
            QueueFullError: Too few are free now.
        """
        if count > self.capacity:
            raise BadParameterError(
                f"one call asks for {count} answers, this server holds {self.capacity} at most", param="n"
            )
        with self._lock:
            if self._held + count > self.capacity:
                raise QueueFullError(f"{self._held} requests are already in the server, which holds {self.capacity}")
            self._held += count

    def release(self, count: int = 1) -> None:
        """Give back `count` places."""
        with self._lock:
            assert self._held >= count, "more places released than reserved"
            self._held -= count
