"""Answers held to a grammar: which tokens may come next, as llguidance tells it from JSON schemas, regexes and Lark.

Compiling runs in threads of its own, within limits on size, work and time, and ends with the first mask: so what is
costly there has been refused before a request reaches the engine, which has to ask for a mask in every step.
"""

import asyncio
import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np
from jaxtyping import UInt32

from serve.request import BadParameterError, QueueFullError

_MAX_BYTES = 64 * 2**10
_MAX_SECONDS = 5.0
_MAX_MASK_SECONDS = 0.5
_WHITESPACE = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,20})?"}
"""Without a bound small models fill their answers with blanks."""

type Schema = dict[str, Any] | bool


class GrammarError(ValueError):
    """A grammar cannot go on: it became too complex, or does not allow a token that was drawn."""


def schema_grammar(schema: Schema) -> str:
    """Give the grammar of JSON that fits a schema."""
    return llguidance.LLMatcher.grammar_from_json_schema(schema_text(schema))


def schema_text(schema: Schema) -> str:
    """Give a schema as JSON, with what holds for all of this server's grammars."""
    named = {} if schema is True else {"not": {}} if schema is False else schema
    return json.dumps(named | {"x-guidance": _WHITESPACE})


def regex_grammar(regex: str) -> str:
    """Give the grammar of texts that a regular expression matches from end to end."""
    return llguidance.LLMatcher.grammar_from_regex(regex)


def lark_grammar(lark: str) -> str:
    """Give a grammar written in llguidance's form of Lark."""
    return llguidance.LLMatcher.grammar_from_lark(lark)


class Grammar:
    """Where an answer stands in its grammar; owned by one thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher = matcher

    def copy(self) -> "Grammar":
        """Give one of its own to another answer, at the same place."""
        return Grammar(self._matcher.deep_copy())

    def fill(self, mask: UInt32[np.ndarray, " W"]) -> None:
        """Set bit i % 32 of word i // 32 for every token i that may come next; clear the others.

        Raises:
            GrammarError: It became too complex.
        """
        begin = time.monotonic()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        if time.monotonic() - begin > _MAX_MASK_SECONDS:
            raise GrammarError(f"the grammar took more than {_MAX_MASK_SECONDS} s to say what may follow")

    def push(self, token: int) -> bool:
        """Add the next token; says whether nothing can follow.

        Raises:
            GrammarError: The token is not allowed here.
        """
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().split("\n", 1)[0])


class Grammars:
    """Compiles grammars for a tokenizer, which is read when the first one is asked for: that takes a second.

    `tokenizer` is one of the `tokenizers` package; masks are of `vocab_size` tokens.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_ids: tuple[int, ...]):
        self._backend, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=200_000,
            step_lexer_fuel=20_000,
            step_max_items=20_000,
            max_lexer_states=20_000,
            max_grammar_size=20_000,
            verbose_errors=False,
        )

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        if not self._eos_ids:
            raise ValueError("it has no end token")
        text = self._backend.to_str()
        return llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(self._eos_ids))

    async def compile(self, text: str, *, param: str) -> Grammar:
        """Compile what one of the functions above gave; `param` is the field that it came from.

        Raises:
            BadParameterError: It is no grammar, or one too large or too complex.
            QueueFullError: Others are being compiled, and it did not get its turn.
        """
        if len(text) > _MAX_BYTES:
            raise BadParameterError(
                f"{param}: the grammar has {len(text)} bytes, at most {_MAX_BYTES} are taken", param=param
            )
        future = self._pool.submit(self._compile, text, param)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), _MAX_SECONDS)
        except TimeoutError:
            if future.cancel():
                raise QueueFullError("other grammars are being compiled") from None
            raise self._too_complex(param) from None

    def _compile(self, text: str, param: str) -> Grammar:
        try:
            tokenizer = self._tokenizer
        except Exception as error:
            raise BadParameterError(f"{param}: this model's tokenizer cannot be held to a grammar: {error}") from None
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=self._limits)
        grammar = Grammar(matcher)
        begin = time.monotonic()
        try:
            grammar.fill(np.zeros(-(-self._vocab_size // 32), np.uint32))
        except GrammarError as error:
            if time.monotonic() - begin > _MAX_MASK_SECONDS:
                raise self._too_complex(param) from None
            raise BadParameterError(f"{param}: {error}"[:500], param=param) from None
        return grammar

    @staticmethod
    def _too_complex(param: str) -> BadParameterError:
        return BadParameterError(f"{param}: the grammar is too complex", param=param)
