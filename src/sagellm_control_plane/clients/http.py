"""An engine behind HTTP: `sage-engine` on this or another machine.

Holds `HTTPEngineClient`. The engine is somebody else's to start and to end: `start` makes contact, `stop` ends it, and
neither touches the engine. Tokens of prompts are counted by the engine, a hop away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import httpx
import msgspec

from sagellm_control_plane.clients.base import EngineLostError
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport, EngineStats
from sagellm_core.report_codec import CacheEvents, PackedReport, unpack_cache, unpack_report
from sagellm_kv_cache import EventBatch
from sagellm_protocol import (
    InternalError,
    ModelDescription,
    NotFoundError,
    Request,
    Response,
    SageLLMError,
    StreamEvent,
    TokenizeRequest,
    UnavailableError,
    parse,
    parse_stream_event,
)
from sagellm_protocol.openai import ErrorResponse

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 30.0  # for what an engine answers at once
_KEPT_CONNECTIONS = 64
# What concerns the control plane alone, and what engines call otherwise than it does.
_NOT_SENT: dict[str, Any] = {"session_id": None, "phase": None, "tenant": None, "model": "default"}


class HTTPEngineClient:
    """A served engine at `url`, such as `http://node-7:9000`; `headers` go with each call, such as a proxy's key.

    A broken connection raises `EngineLostError` from whatever was under way on it; one that is refused raises
    `UnavailableError`.
    """

    def __init__(self, url: str, *, engine_id: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self.engine_id = engine_id or self.url.partition("://")[2]
        self._headers = dict(headers or {})
        self._config = LLMEngineConfig(model_path="default", engine_id=self.engine_id)
        self._http: httpx.AsyncClient | None = None
        self._info: dict[str, Any] = {}
        self._description: ModelDescription | None = None
        self._running: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # watchers, and calls that nobody waits for

    @property
    def config(self) -> LLMEngineConfig:
        """What the engine tells of its own, once contact is made."""
        return self._config

    # ---- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make contact; raises `UnavailableError` where nobody answers, or not as an engine does."""
        if self._http is not None:
            return
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT_CONNECTIONS)
        timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
        self._http = httpx.AsyncClient(base_url=self.url, headers=self._headers, limits=limits, timeout=timeout)
        try:
            self._info = await self._ask("GET", "/info", dict[str, Any])
            self._description = ModelDescription.model_validate(await self._ask("GET", "/model", dict[str, Any]))
            self._config = _config_of(self._info, self.engine_id)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the contact; requests under way end with it, the engine goes on."""
        http, self._http = self._http, None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if http is not None:
            await http.aclose()

    async def drain(self) -> None:
        """As `LLMEngine.drain`."""
        await self._ask("POST", "/drain", None, timeout_s=None)

    def resume(self) -> None:
        """Take requests again after `drain`."""
        if self._http is not None:
            self._do(self._ask("POST", "/resume", None))

    # ---- requests -------------------------------------------------------------------------------------

    async def execute(self, request: Request, /) -> Response:
        """The whole answer, or the vector that was asked for."""
        body = request.model_copy(update={**_NOT_SENT, "stream": False}).model_dump_json()
        with self._registered(request):
            async with self._call("POST", "/v1/completions", body) as answer:
                content = await answer.aread()
                if answer.status_code != 200 and b'"request_id"' not in content[:64]:
                    raise _refusal(answer, content)
        response = parse(Response, content, what=f"answer of {self.url}")
        return response.model_copy(update={"model": request.model, "engine_id": self.engine_id})

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made: one start, deltas, exactly one end. Leaving the loop frees the request."""
        body = request.model_copy(update=_NOT_SENT).model_dump_json()
        with self._registered(request):
            async with (
                self._call("POST", "/v1/completions/stream", body) as answer,
                aclosing(_messages(answer)) as messages,
            ):
                async for message in messages:
                    event = self._event(message)
                    yield event
                    if event.event == "end":
                        return
            raise self._lost("ended a stream before its end")

    def abort(self, request_id: str) -> None:
        """End a request; whoever reads it gets the finish reason `abort`."""
        if request_id not in self._running:
            raise NotFoundError(f"no request {request_id!r} is running", request_id=request_id)
        self._do(self._ask("POST", "/abort", None, {"request_id": request_id}))

    # ---- what the engine tells ------------------------------------------------------------------------

    async def health_check(self) -> bool:
        """Whether the engine answers that its step loop runs."""
        try:
            await self._ask("GET", "/health", dict[str, Any])
        except SageLLMError:
            return False
        return True

    async def stats(self) -> EngineStats:
        """Running and waiting requests, KV usage and counters at this moment."""
        return await self._ask("GET", "/stats", EngineStats)

    def watch(self, callback: Callable[[EngineReport], None], *, interval_s: float = 0.25) -> Callable[[], None]:
        """Call `callback` with reports until the contact breaks; returns what ends that."""
        self._contact()
        task = self._do(self._read_reports(callback, interval_s))

        def end() -> None:
            task.cancel()

        return end

    async def cache_snapshot(self) -> EventBatch:
        """All that is cached, as events without token ids."""
        return unpack_cache(await self._ask("GET", "/cache", CacheEvents))

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        return await self._ask("POST", "/reset_prefix_cache", bool)

    def get_info(self) -> dict[str, Any]:
        """What the engine told of itself when contact was made."""
        return {**self._info, "engine_id": self.engine_id, "url": self.url, "running": self._http is not None}

    async def describe_model(self) -> ModelDescription:
        """What the model is, once contact is made."""
        if self._description is None:
            raise UnavailableError("the engine is not running; call start() first")
        return self._description

    async def tokenize(self, request: TokenizeRequest, /) -> list[int]:
        """The token ids of a text or a conversation."""
        return await self._ask("POST", "/tokenize", list[int], request.model_dump(mode="json", exclude_none=True))

    async def detokenize(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`, with the texts of special tokens unless they are skipped."""
        body = {"token_ids": list(token_ids), "skip_special_tokens": skip_special_tokens}
        return await self._ask("POST", "/detokenize", str, body)

    async def token_texts(self, token_ids: Sequence[int], /) -> list[str]:
        """The text of each token by itself."""
        return await self._ask("POST", "/detokenize", list[str], {"token_ids": list(token_ids), "is_each": True})

    # ---- steps of the above ---------------------------------------------------------------------------

    def _contact(self) -> httpx.AsyncClient:
        if self._http is None:
            raise UnavailableError("the engine is not running; call start() first")
        return self._http

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, body: str | None = None, timeout_s: float | None = None
    ) -> AsyncIterator[httpx.Response]:
        """An answer whose body is not read yet."""
        headers = {} if body is None else {"content-type": "application/json"}
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        try:
            async with self._contact().stream(method, path, content=body, headers=headers, timeout=timeout) as answer:
                yield answer
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnavailableError(f"nobody answers at {self.url}: {error or 'no answer'}; is it running?") from error
        except httpx.TransportError as error:
            raise self._lost(f"broke the connection ({type(error).__name__})") from error
        except RuntimeError as error:  # the contact was ended under it
            if self._http is not None:
                raise
            raise UnavailableError("the engine was stopped; call start() first") from error

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[_T] | None,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = _ANSWER_TIMEOUT_S,
    ) -> _T:
        text = None if body is None else msgspec.json.encode(body).decode()
        async with self._call(method, path, text, timeout_s) as answer:
            content = await answer.aread()
        if answer.status_code != 200:
            raise _refusal(answer, content)
        try:
            return msgspec.json.decode(content, type=type(None) if kind is None else kind)  # type: ignore[return-value]
        except msgspec.DecodeError as error:
            raise UnavailableError(f"{self.url}{path} does not answer as a sage-engine does: {error}") from error

    def _event(self, message: bytes) -> StreamEvent:
        try:
            return parse_stream_event(message).model_copy(update={"engine_id": self.engine_id})
        except SageLLMError:
            raise parse(ErrorResponse, message, what=f"event of {self.url}").to_exception() from None

    async def _read_reports(self, callback: Callable[[EngineReport], None], interval_s: float) -> None:
        path = f"/reports?interval_s={interval_s:g}"
        async with self._call("GET", path) as answer, aclosing(_messages(answer)) as messages:
            async for message in messages:
                try:
                    report = msgspec.json.decode(message, type=PackedReport)
                except msgspec.DecodeError:
                    raise parse(ErrorResponse, message, what=f"report of {self.url}").to_exception() from None
                callback(unpack_report(report))

    def _do(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("%s: %s", self.engine_id, task.exception())

    def _lost(self, reason: str) -> EngineLostError:
        return EngineLostError(f"engine {self.engine_id} at {self.url} {reason}", engine_id=self.engine_id)

    @contextmanager
    def _registered(self, request: Request) -> Iterator[None]:
        """While the request is under way it can be aborted."""
        self._running.add(request.request_id)
        try:
            yield
        finally:
            self._running.discard(request.request_id)


def _config_of(info: Mapping[str, Any], engine_id: str) -> LLMEngineConfig:
    fields = {
        "model_path": info.get("model"),
        "engine_id": engine_id,
        "max_model_len": info.get("max_model_len"),
        "max_batch_size": info.get("max_batch_size"),
        "block_size": info.get("kv_block_size"),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return parse(LLMEngineConfig, given, what="engine's information")


def _refusal(answer: httpx.Response, content: bytes) -> SageLLMError:
    try:
        return parse(ErrorResponse, content, what="error").to_exception(answer.status_code)
    except SageLLMError:
        return InternalError(f"{answer.url} answered with status {answer.status_code}")


async def _messages(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events; raises what the answer's status says."""
    if answer.status_code != 200:
        raise _refusal(answer, await answer.aread())
    rest = b""
    async for part in answer.aiter_raw():
        *messages, rest = (rest + part).split(b"\n\n")
        for message in messages:
            if message.startswith(b"data: "):  # else a comment that keeps the connection alive
                yield message[6:]
