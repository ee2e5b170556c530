"""An engine on virtual time that makes real answers of no model: each token a function of prompt, seed and position.

So any engine can go on where another stopped, and a test knows every answer beforehand (`answer_of`). It loads, steps,
hangs and dies as a child process does (`FakeChild`), keeps a prefix cache and tells of it, and dies of prompts that
begin with `poison`: of `poison` with the first token, of `poison7` with the eighth.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from fake_child import STATS, FakeChild
from sagellm_control_plane.clients.base import EngineLostError
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport, EngineStats, StepSample
from sagellm_kv_cache import CacheDigest, EventBatch
from sagellm_kv_cache.events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent
from sagellm_kv_cache.hashing import digest_of, extend_block_hashes, root_hash
from sagellm_protocol import (
    CompletionOutput,
    FinishReason,
    InvalidArgumentError,
    KVTransferError,
    Metrics,
    NotFoundError,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenizeRequest,
    UnavailableError,
    Usage,
)

BLOCK_SIZE = 4
CHARS_PER_TOKEN = 4
_STEP_S = 0.02
_PREFILL_S_PER_TOKEN = 0.002
_MAX_BLOCKS = 64


def tokens_of(prompt: str) -> list[int]:
    """The tokens of a text: one for four characters."""
    pieces = [prompt[start : start + CHARS_PER_TOKEN] for start in range(0, len(prompt), CHARS_PER_TOKEN)]
    return [int.from_bytes(blake2b(piece.encode(), digest_size=3).digest(), "big") for piece in pieces]


def answer_of(request: Request, seed: int) -> list[tuple[list[int], FinishReason]]:
    """Tokens and end of each output of a request that runs with `seed`."""
    sampling = request.resolved_sampling()
    prompt = request.prompt if isinstance(request.prompt, list) else tokens_of(request.prompt or "")
    answers = []
    for index in range(sampling.n):
        key = repr((prompt, seed, index)).encode()
        length = 1 + int.from_bytes(blake2b(key, digest_size=2).digest(), "big") % 40
        tokens = [
            int.from_bytes(blake2b(key, digest_size=2, salt=position.to_bytes(4, "big")).digest(), "big")
            for position in range(min(length, sampling.max_tokens))
        ]
        answers.append((tokens, FinishReason.STOP if length <= sampling.max_tokens else FinishReason.LENGTH))
    return answers


@dataclass(eq=False)
class _Run:
    """A request on the engine."""

    request: Request
    seed: int
    answers: list[tuple[list[int], FinishReason]]
    events: asyncio.Queue[StreamEvent | Exception] = field(default_factory=asyncio.Queue)
    num_made: list[int] = field(default_factory=list)
    num_uncached: int = 0

    @property
    def is_done(self) -> bool:
        return all(made >= len(tokens) for made, (tokens, _) in zip(self.num_made, self.answers, strict=True))


class SimEngine(FakeChild):
    """See the module. `requests` are those that run; `num_resumed` counts those that came with a resume point."""

    def __init__(
        self, name: str, *, places: int = 3, seed: int = 0, is_deaf: bool = False, is_late: bool = False, **options: Any
    ) -> None:
        super().__init__(name, **options)
        self.is_late = is_late  # tokens are told with the next step, and lost with an engine that dies in it
        self._on_the_way: list[tuple[_Run, StreamEventDelta]] = []
        self.is_deaf = is_deaf  # its streams don't notice when it dies, as behind a connection that is half open
        self.config = LLMEngineConfig(
            model_path="sim", engine_id=name, max_batch_size=places, block_size=BLOCK_SIZE, max_new_tokens=20
        )
        self.requests: dict[str, _Run] = {}
        self.num_resumed = 0
        self.killers: list[str] = []  # requests that it died of
        self.cached: dict[bytes, bytes] = {}  # block -> its parent, least recently used first
        self._rng = random.Random(f"{name} {seed}")
        self._epochs = itertools.count()
        self._epoch = ""
        self._events: list[KVCacheEvent] = []
        self._next_event = 0
        self._steps: list[StepSample] = []
        self._loop: asyncio.Task[None] | None = None

    # ---- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        if self.is_running:
            return
        await super().start()
        self._epoch = f"{self.engine_id}-{next(self._epochs)}"
        self.cached, self._events, self._next_event, self._steps, self._on_the_way = {}, [], 0, [], []
        self._loop = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        for run in list(self.requests.values()):
            self._finish(run, FinishReason.ABORT)
        await super().stop()

    async def drain(self) -> None:
        while self.requests:
            await asyncio.sleep(_STEP_S)

    def resume(self) -> None:
        pass

    def die(self, *, is_seen: bool = True) -> None:
        was_running = self.is_running
        super().die(is_seen=is_seen)
        if was_running and is_seen:
            self._break_streams()

    def crash(self) -> None:
        """End by itself: nobody sees why."""
        self.is_struck = False
        self.die()

    async def kill(self) -> None:
        await super().kill()
        self._break_streams()

    def _break_streams(self) -> None:
        for run in () if self.is_deaf else self.requests.values():
            run.events.put_nowait(EngineLostError(f"{self.engine_id} died", engine_id=self.engine_id))

    def _end(self) -> None:
        super()._end()
        if self._loop is not None and self._loop is not asyncio.current_task():
            self._loop.cancel()

    # ---- requests -------------------------------------------------------------------------------------

    async def execute(self, request: Request, /) -> Response:
        async for event in self.stream(request):
            last = event
        assert isinstance(last, StreamEventEnd)
        return last.to_response()

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        if not self.is_running:
            raise UnavailableError("the engine is not running; call start() first")
        if request.request_id in self.requests:
            raise InvalidArgumentError(f"request_id {request.request_id!r} is already running; use a fresh id")
        run = self._begin(request)
        try:
            while True:
                event = await run.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, StreamEventEnd):
                    return
        finally:
            self.requests.pop(request.request_id, None)

    def abort(self, request_id: str) -> None:
        if request_id not in self.requests:
            raise NotFoundError(f"no request {request_id!r} is running")
        if not self.is_hanging:
            self._finish(self.requests[request_id], FinishReason.ABORT)

    def _begin(self, request: Request) -> _Run:
        sampling, resume = request.resolved_sampling(), request.resume_from
        seed = self._rng.randrange(2**31) if sampling.seed is None else sampling.seed
        if resume is not None:
            seed = resume.seed
            self.num_resumed += 1
        run = _Run(request, seed, answer_of(request, seed))
        run.num_made = [0] * sampling.n
        for index, given in enumerate(() if resume is None else resume.output_token_ids):
            assert given == run.answers[index][0][: len(given)], "what was delivered is no beginning of the answer"
            run.num_made[index] = len(given)
        run.num_uncached = self._look_up(request) + sum(run.num_made)
        self.requests[request.request_id] = run
        run.events.put_nowait(StreamEventStart(prompt_tokens=len(_prompt(request)), seed=seed, **self._names(run)))
        return run

    async def _run(self) -> None:
        """The step loop: a prefill, or a token for each output of each request."""
        while self.is_running:
            runs = list(self.requests.values())
            prefill = next((run for run in runs if run.num_uncached), None)
            duration_s = _STEP_S if prefill is None else _STEP_S + _PREFILL_S_PER_TOKEN * prefill.num_uncached
            await asyncio.sleep(duration_s)
            while self.is_hanging:
                await asyncio.sleep(_STEP_S)
            if not self.is_running:
                return
            self._step(runs, prefill, duration_s)

    def _step(self, runs: Sequence[_Run], prefill: _Run | None, duration_s: float) -> None:
        decoding = [run for run in runs if not run.num_uncached and run.request.request_id in self.requests]
        num_prefill = 0 if prefill is None else prefill.num_uncached
        if prefill is not None:
            prefill.num_uncached = 0
            self._store(prefill.request)
        if runs:
            self.num_steps += 1
            self._steps.append(
                StepSample(num_prefill, num_prefill**2 / 2, 10 * len(decoding), len(decoding), duration_s)
            )
        made, self._on_the_way = self._on_the_way, []
        for run in decoding:
            if self._dies_of(run):
                self.crash()
                self.killers.append(run.request.request_id.removesuffix("-prefill"))
                return
            self._decode(run)
        for earlier, event in made:
            earlier.events.put_nowait(event)
        for run in runs:
            if run.is_done:
                self._finish(run, None)

    def _dies_of(self, run: _Run) -> bool:
        prompt = run.request.prompt
        if not isinstance(prompt, str) or not prompt.startswith("poison"):
            return False
        digits = prompt.removeprefix("poison").split()[0] if prompt != "poison" else "0"
        return run.num_made[0] >= int(digits or 0)

    def _decode(self, run: _Run) -> None:
        for index, (tokens, _) in enumerate(run.answers):
            made = run.num_made[index]
            if made < len(tokens):
                chunk = f"{tokens[made]} "
                event = StreamEventDelta(chunk=chunk, chunk_tokens=[tokens[made]], index=index, **self._names(run))
                run.num_made[index] += 1
                if self.is_late:
                    self._on_the_way.append((run, event))
                else:
                    run.events.put_nowait(event)

    def _finish(self, run: _Run, reason: FinishReason | None) -> None:
        if self.requests.pop(run.request.request_id, None) is None:
            return
        for earlier, event in self._on_the_way:
            if earlier is run:
                run.events.put_nowait(event)
        self._on_the_way = [late for late in self._on_the_way if late[0] is not run]
        outputs = [
            CompletionOutput(
                index=index,
                text="".join(f"{token} " for token in tokens[:made]),
                token_ids=tokens[:made],
                finish_reason=reason or end,
            )
            for index, (made, (tokens, end)) in enumerate(zip(run.num_made, run.answers, strict=True))
        ]
        usage = Usage(prompt_tokens=len(_prompt(run.request)), completion_tokens=sum(run.num_made))
        response = Response.of(
            outputs, model=run.request.model, usage=usage, metrics=Metrics(ttft_ms=1.0), **self._names(run)
        )
        run.events.put_nowait(StreamEventEnd.of(response))

    def _names(self, run: _Run) -> dict[str, Any]:
        return {"request_id": run.request.request_id, "trace_id": run.request.trace_id, "engine_id": self.engine_id}

    # ---- the prefix cache -----------------------------------------------------------------------------

    def _look_up(self, request: Request) -> int:
        """Tokens of the prompt that are not cached; never none, the last one is computed always."""
        tokens = _prompt(request)
        num_cached = 0
        for block_hash in _hashes(tokens, request.cache_salt, request.lora):
            if block_hash not in self.cached:
                break
            num_cached += BLOCK_SIZE
        return max(1, len(tokens) - num_cached)

    def _store(self, request: Request) -> None:
        self._keep(_prompt(request), request.cache_salt, request.lora)

    def _keep(self, tokens: Sequence[int], cache_salt: str | None, lora: str | None) -> None:
        parent = root_hash(cache_salt, lora)
        for number, block_hash in enumerate(_hashes(tokens, cache_salt, lora)):
            if block_hash not in self.cached:
                block = tuple(tokens[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])
                self._tell(BlockStored((block_hash,), parent, block, BLOCK_SIZE))
            self.cached.pop(block_hash, None)
            self.cached[block_hash] = parent = block_hash
        while len(self.cached) > _MAX_BLOCKS:
            oldest = next(iter(self.cached))
            del self.cached[oldest]
            self._tell(BlockRemoved((oldest,)))

    def _tell(self, event: KVCacheEvent) -> None:
        self._events.append(event)

    async def cache_snapshot(self) -> EventBatch:
        if not self.is_running:
            raise UnavailableError("the engine is not running; call start() first")
        self._events = [
            AllBlocksCleared(),
            *(BlockStored((block,), b"", (0,) * BLOCK_SIZE, BLOCK_SIZE) for block in self.cached),
        ]
        return EventBatch(self._next_event, tuple(self._events))

    async def export_prefix(
        self, token_ids: Sequence[int], *, cache_salt: str | None = None, lora_id: str | None = None
    ) -> Any:
        await asyncio.sleep(0.01)
        if not self.is_running:
            raise EngineLostError(f"{self.engine_id} died")
        if self._rng.random() < 0.2:
            raise KVTransferError(f"{self.engine_id} lost the blocks")
        return (list(token_ids), cache_salt, lora_id)

    async def import_prefix(self, blocks: Any) -> int:
        await asyncio.sleep(0.01)
        if not self.is_running:
            raise EngineLostError(f"{self.engine_id} died")
        if self._rng.random() < 0.2:
            raise KVTransferError(f"{self.engine_id} has another layout")
        self._keep(*blocks)
        return len(blocks[0]) // BLOCK_SIZE * BLOCK_SIZE

    # ---- information ----------------------------------------------------------------------------------

    async def _report(self, callback: Callable[[Any], None], interval_s: float) -> None:
        sequence = itertools.count()
        while self.is_running and self.reports:
            if not self.is_hanging:
                callback(self._make_report(next(sequence)))
            await asyncio.sleep(interval_s)

    def _make_report(self, sequence: int) -> EngineReport:
        batch = EventBatch(self._next_event, tuple(self._events))
        if self._events and self._rng.random() < 0.1:  # an event is lost on its way
            batch = EventBatch(self._next_event + 1, tuple(self._events[1:]), 1)
        self._next_event += len(self._events)
        self._events, steps, self._steps = [], tuple(self._steps), []
        xor = 0
        for block in self.cached:
            xor ^= digest_of(block)
        return EngineReport(self._epoch, sequence, self._stats(), steps, batch, CacheDigest(len(self.cached), xor))

    def _stats(self) -> EngineStats:
        return replace(STATS, num_steps=self.num_steps, num_running=len(self.requests))

    async def stats(self) -> EngineStats:
        return self._stats()

    async def tokenize(self, request: TokenizeRequest, /) -> list[int]:
        return tokens_of(request.prompt or "")

    def get_info(self) -> dict[str, Any]:
        return {"engine_id": self.engine_id}

    async def reset_prefix_cache(self) -> bool:
        return not self.requests


def _prompt(request: Request) -> list[int]:
    if isinstance(request.prompt, list):
        return request.prompt
    return request.prompt_token_ids or tokens_of(request.prompt or "")


def _hashes(tokens: Sequence[int], cache_salt: str | None, lora: str | None) -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes(hashes, tokens, BLOCK_SIZE, len(tokens) // BLOCK_SIZE, root_hash(cache_salt, lora))
    return hashes
