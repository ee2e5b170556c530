"""Compiled grammars of one model: made in threads, kept for the next request, bounded in number, size and time."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher

from sagellm_core.structured.base import Grammar
from sagellm_core.structured.completion import Completion, CompletionSearch
from sagellm_core.structured.source import cannot_compile, grammar_source, parser_limits
from sagellm_core.structured.steering import SteeredMatcher
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import Tokenizer
from sagellm_protocol import InvalidArgumentError, ResourceExhaustedError, StructuredOutput

# States that the first search may look at: some hundred milliseconds at most.
_MAX_STATES = 4096


@dataclass(frozen=True, slots=True)
class CompileLimits:
    """What one form may cost: bytes as JSON or text, levels of nesting, seconds; and how many are kept and wait."""

    max_bytes: int = 256 * 1024
    max_depth: int = 64
    max_seconds: float = 10.0
    num_cached: int = 128
    num_waiting: int = 256


class CompiledGrammar(Grammar):
    """A grammar of llguidance at its start, over tokens and over symbols, with its shortest completion."""

    def __init__(self, vocabulary: Vocabulary, wanted: StructuredOutput, limits: CompileLimits) -> None:
        source = grammar_source(wanted, max_bytes=limits.max_bytes, max_depth=limits.max_depth)
        self._vocabulary = vocabulary
        self._tokens = LLMatcher(vocabulary.tokens, source.text, log_level=0, limits=parser_limits())
        mask = self._tokens.compute_bitmask() if not self._tokens.is_error() else b""
        if self._tokens.is_error():
            raise cannot_compile(self._tokens.get_error())
        if not any(mask):
            raise cannot_compile("no text has this form")
        self._search = CompletionSearch(vocabulary, source.literals)
        translated = vocabulary.translate(source.text)
        symbols = None
        if translated is not None:
            symbols = LLMatcher(vocabulary.symbols, translated, log_level=0, limits=parser_limits())
        self._symbols = None if symbols is None or symbols.is_error() else symbols
        self.completion = self._shortest_completion()

    def _shortest_completion(self) -> Completion | None:
        if self._symbols is None:
            return None
        return self._search.find(self._symbols, max_states=_MAX_STATES)

    def start(self, max_tokens: int, emitted: Sequence[int] = ()) -> SteeredMatcher:
        matcher = SteeredMatcher(
            self._vocabulary,
            self._tokens.deep_copy(),
            None if self._symbols is None else self._symbols.deep_copy(),
            self.completion,
            self._search,
            max_tokens + len(emitted),
        )
        if emitted:
            matcher.replay(emitted, max_tokens)
        return matcher


class GrammarCompiler:
    """Serves `compile` from any event loop. Nothing is built before the first call."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        limits: CompileLimits | None = None,
    ) -> None:
        self._limits = limits or CompileLimits()
        self._model = (tokenizer, vocab_size, eos_token_ids)
        self._vocabulary: Vocabulary | None = None
        self._building = threading.Lock()
        self._lock = threading.Lock()
        self._grammars: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._num_waiting = 0
        # Two threads: few, as compilation competes with the step loop, but one slow form must not hold up all others.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar-compiler")

    async def compile(self, wanted: StructuredOutput) -> Grammar:
        """The grammar for `wanted`, from the cache if it was asked for lately.

        Raises:
            InvalidArgumentError: it cannot be compiled, or not within the limits.
            ResourceExhaustedError: too many others wait to be compiled.
            UnsupportedError: the model's tokenizer does not allow it.
        """
        future = self._future(wanted)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), self._limits.max_seconds)
        except asyncio.TimeoutError:
            if not (future.running() or future.done()):
                raise ResourceExhaustedError(
                    "structured_output waited too long behind others to be compiled; retry later", retryable=True
                ) from None
            raise InvalidArgumentError(
                f"structured_output took longer than {self._limits.max_seconds:g} s to compile; simplify it",
                field="structured_output",
            ) from None

    def close(self) -> None:
        """Compile nothing more; what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _future(self, wanted: StructuredOutput) -> Future[Grammar]:
        key = wanted.model_dump_json(exclude_defaults=True)
        with self._lock:
            future = self._grammars.get(key)
            if future is not None:
                self._grammars.move_to_end(key)
                return future
            if self._num_waiting >= self._limits.num_waiting:
                raise ResourceExhaustedError(
                    f"{self._num_waiting} forms of structured output wait to be compiled; retry later", retryable=True
                )
            self._num_waiting += 1
            future = self._grammars[key] = self._threads.submit(self._compile, wanted)
        future.add_done_callback(lambda done: self._settle(key, done))
        return future

    def _compile(self, wanted: StructuredOutput) -> Grammar:
        with self._building:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(*self._model)
        return CompiledGrammar(self._vocabulary, wanted, self._limits)

    def _settle(self, key: str, future: Future[Grammar]) -> None:
        """Keep what was compiled, forget what failed, and let go of what was not asked for lately."""
        with self._lock:
            self._num_waiting -= 1
            if future.cancelled() or future.exception() is not None:
                self._grammars.pop(key, None)
            while len(self._grammars) > self._limits.num_cached:
                self._grammars.popitem(last=False)
