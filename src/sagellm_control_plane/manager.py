"""`ControlPlaneManager`: engines behind one door; requests queue by policy and are routed to a free engine."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sagellm_control_plane.admission import Admission, Ticket
from sagellm_control_plane.config import ParallelismConfig, PDSeparationConfig
from sagellm_control_plane.engines import Engine, ManagedEngine
from sagellm_control_plane.policies import get_policy
from sagellm_control_plane.router import get_router
from sagellm_control_plane.sampling import as_sampling_params
from sagellm_control_plane.types import (
    ControlPlaneMetrics,
    EngineInfo,
    EngineState,
    ExecutionInstance,
    PerformanceTotals,
)
from sagellm_core.config import BackendConfig, EngineConfig, LLMEngineConfig
from sagellm_core.embedding import EMBEDDINGS_AT_ONCE, Inputs, embedding_requests, execute_all
from sagellm_protocol import (
    InvalidArgumentError,
    ModelDescription,
    NotFoundError,
    Request,
    Response,
    StreamEvent,
    StreamEventEnd,
    TokenizeRequest,
    UnavailableError,
)

if TYPE_CHECKING:
    from sagellm_core.engine_core.engine_core import EngineStats

logger = logging.getLogger(__name__)


def local_engine(config: LLMEngineConfig) -> Engine:
    """An engine in this process."""
    # Imported here because it brings torch.
    from sagellm_core.llm_engine import LLMEngine

    return LLMEngine(config)


class ControlPlaneManager:
    """Starts engines in this process and spreads requests over them.

    >>> manager = ControlPlaneManager(engine_configs=[EngineConfig(kind="cpu", model="builtin")])
    >>> await manager.start()
    >>> response = await manager.execute_request(prompt="Hello", max_tokens=128)
    >>> await manager.stop()

    Belongs to one event loop. Engines that were not started start with the first request for their model. `make_engine`
    makes those that are given as configurations or instances.
    """

    def __init__(
        self,
        backend_config: BackendConfig | None = None,
        engine_configs: Sequence[EngineConfig] = (),
        *,
        scheduling_policy: str = "fifo",
        routing_policy: str | None = None,
        enable_pd_separation: bool = False,
        pd_config: PDSeparationConfig | None = None,
        parallelism_config: ParallelismConfig | None = None,
        max_num_waiting: int = 4096,
        make_engine: Callable[[LLMEngineConfig], Engine] = local_engine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend_config = backend_config or BackendConfig()
        self.parallelism_config = parallelism_config or ParallelismConfig()
        self.pd_config = (pd_config or PDSeparationConfig()) if enable_pd_separation else None
        fallback = "adaptive" if self.pd_config is None else self.pd_config.routing_policy
        self._make_engine = make_engine
        self._clock = clock
        self._engines: dict[str, ManagedEngine] = {}
        self.allowed_models: dict[str, EngineConfig] = {}  # configurations that further engines may be made of
        self._leaving: set[str] = set()  # engines that are being unregistered
        self._admission = Admission(
            self._engines,
            get_policy(scheduling_policy),
            get_router(routing_policy or fallback),
            pd_config=self.pd_config,
            max_num_waiting=max_num_waiting,
            clock=clock,
        )
        self._totals = PerformanceTotals()
        self._started_at = clock()
        self._is_stopped = False
        for config in engine_configs:
            self.allowed_models.setdefault(config.model, config)
            self.register_config(config)

    # ---- engines --------------------------------------------------------------------------------------

    def register_config(self, config: EngineConfig) -> str:
        """Add an engine of this process by configuration; returns its id. It loads as `register_instance` says."""
        name = config.engine_id or _free_name(self._engines)
        self._check_new(name)
        llm_config = config.to_llm_engine_config(self.backend_config).model_copy(update={"engine_id": name})
        instance = ExecutionInstance(
            instance_id=name, model_name=config.model, max_concurrent_requests=llm_config.max_batch_size
        )
        self._add(instance, self._make_engine(llm_config))
        return name

    def register_instance(self, instance: ExecutionInstance) -> None:
        """Add an engine of this process by description; it loads when the manager starts or a request comes."""
        if instance.tensor_parallel_size * instance.pipeline_parallel_size > 1:
            logger.warning("%s runs on one device of this process, not on %d", instance.instance_id, instance.gpu_count)
        config = EngineConfig(
            model=instance.model_name,
            engine_id=instance.instance_id,
            options={"max_batch_size": instance.max_concurrent_requests},
        )
        self._check_new(instance.instance_id)
        self._add(instance, self._make_engine(config.to_llm_engine_config(self.backend_config)))

    def register_engine(self, engine: Engine, *, engine_id: str | None = None, model: str | None = None) -> str:
        """Add an engine object; returns its id. `model` is the name it is asked by."""
        name = engine_id or engine.engine_id
        instance = ExecutionInstance(
            instance_id=name,
            model_name=model or engine.config.model_path,
            max_concurrent_requests=engine.config.max_batch_size,
        )
        self._add(instance, engine)
        return name

    async def unregister_engine(self, engine_id: str) -> None:
        """Take no more requests for an engine, let those in flight end, then stop it."""
        engine = self._engine(engine_id)
        engine.state = EngineState.DRAINING
        engine.is_held = True
        self._leaving.add(engine_id)
        self._admission.dispatch()  # requests that wait for this engine alone are refused now
        try:
            await engine.drain()
            self._engines.pop(engine_id, None)
        finally:
            self._leaving.discard(engine_id)

    def start_engine(self, engine_id: str) -> asyncio.Task[None]:
        """Begin to load an engine, or let one that was drained take requests again; the task ends when it is ready.

        Raises `UnavailableError` for an engine that is being unregistered.
        """
        engine = self._staying(engine_id)
        engine.resume()
        engine.forget_failure()
        self._admission.dispatch()
        return engine.start(self._admission.dispatch)

    def drain_engine(self, engine_id: str) -> None:
        """Take no more requests for an engine until `start_engine`; those in flight end, the model stays loaded."""
        self._staying(engine_id).hold()
        self._admission.dispatch()

    async def stop_engine(self, engine_id: str) -> None:
        """End an engine's requests with `abort` and free its model; it stays out until `start_engine`."""
        engine = self._staying(engine_id)
        engine.hold()
        self._admission.dispatch()
        await engine.stop()

    async def reset_prefix_cache(self) -> dict[str, bool]:
        """Forget all cached prefixes of the loaded engines, by id; False where requests hold blocks."""
        loaded = [engine for engine in self._engines.values() if engine.is_loaded]
        done = await asyncio.gather(*(engine.engine.reset_prefix_cache() for engine in loaded))
        return {engine.engine_id: is_done for engine, is_done in zip(loaded, done, strict=True)}

    def list_engines(self) -> list[EngineInfo]:
        """All engines at this moment."""
        return [engine.info() for engine in self._engines.values()]

    def get_engine(self, engine_id: str) -> EngineInfo:
        """One engine at this moment; `NotFoundError` for an unknown id."""
        return self._engine(engine_id).info()

    def model_of(self, engine_id: str) -> str:
        """The name of an engine's model; empty for an unknown id."""
        engine = self._engines.get(engine_id)
        return "" if engine is None else engine.instance.model_name

    def get_engine_config(self, engine_id: str) -> LLMEngineConfig:
        """What one engine runs with; `NotFoundError` for an unknown id."""
        return self._engine(engine_id).engine.config

    def get_engine_details(self, engine_id: str) -> dict[str, Any]:
        """Model, device, memory and kernels, as `LLMEngine.get_info` has them; `NotFoundError` for an unknown id."""
        return self._engine(engine_id).engine.get_info()

    async def start(self) -> None:
        """Load all engines. Raises the first error where none could start; otherwise what failed is in its info."""
        if not self._engines:
            raise InvalidArgumentError("no engine is registered; give engine_configs or call register_instance first")
        self._is_stopped = False
        for engine in self._engines.values():
            engine.resume()
            engine.forget_failure()
        starting = [engine.start(self._admission.dispatch) for engine in self._engines.values()]
        await asyncio.wait(starting)
        if all(task.exception() is not None for task in starting):
            starting[0].result()

    async def stop(self) -> None:
        """Stop all engines; their requests end with the finish reason `abort`, waiting ones are refused."""
        self._is_stopped = True
        self._admission.refuse_all(UnavailableError("the control plane was stopped"))
        await asyncio.gather(*(engine.stop() for engine in self._engines.values()))

    async def __aenter__(self) -> ControlPlaneManager:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # ---- requests -------------------------------------------------------------------------------------

    async def execute_request(self, request: Request | None = None, **fields: Any) -> Response:
        """Answer a protocol request, or one made of `fields` (prompt, max_tokens, sampling_params ...).

        Raises `NotFoundError` for a model that no engine serves, `ResourceExhaustedError` where the queue is full,
        `UnavailableError` where no engine runs, `DeadlineExceededError` where the deadline passed in the queue.
        """
        call = self._accept(request or Request(**fields))
        async with self._admission.place(call) as ticket:
            started_at = self._clock()
            response = _mark_late(await ticket.engine.engine.execute(call), ticket)
            self._totals.add(response, self._clock() - started_at)
            return response

    async def process_request(self, prompt: str | list[int], sampling_params: Any = None, **fields: Any) -> Response:
        """As `execute_request`; takes vLLM's `SamplingParams` too, see `as_sampling_params`."""
        if sampling_params is not None:
            fields["sampling_params"] = as_sampling_params(sampling_params)
        return await self.execute_request(prompt=prompt, **fields)

    async def get_embeddings(
        self, inputs: Inputs, *, model: str = "default", dimensions: int | None = None
    ) -> list[list[float]]:
        """A vector for each text, or list of token ids, as `LLMEngine.embed`; each counts as a request."""
        requests = embedding_requests(inputs, dimensions=dimensions, model=model)
        responses = await execute_all(self.execute_request, requests, at_once=EMBEDDINGS_AT_ONCE)
        return [response.embedding or [] for response in responses]

    async def stream_request(self, request: Request | None = None, **fields: Any) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made: one start, deltas, exactly one end. Leaving the loop frees the request."""
        call = self._accept(request or Request(**{"stream": True, **fields}))
        async with self._admission.place(call) as ticket:
            started_at = self._clock()
            async with aclosing(ticket.engine.engine.stream(call)) as events:
                async for event in events:
                    if isinstance(event, StreamEventEnd):
                        response = _mark_late(event.to_response(), ticket)
                        self._totals.add(response, self._clock() - started_at)
                        yield StreamEventEnd.of(response)
                    else:
                        yield event

    # ---- models ---------------------------------------------------------------------------------------

    async def describe_model(self, model: str) -> ModelDescription:
        """What a model is; its engine starts if it has to. Raises `NotFoundError` for one that no engine serves."""
        engine = await self._loaded(model)
        assert engine.description is not None, "engines are described when they start"
        return engine.description

    async def tokenize(self, model: str, **fields: Any) -> list[int]:
        """The token ids of a text or a conversation; `fields` are those of `TokenizeRequest`."""
        return await (await self._loaded(model)).engine.tokenize(TokenizeRequest(**fields))

    async def detokenize(self, model: str, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`; `InvalidArgumentError` for an id that the model does not have."""
        vocab_size = (await self.describe_model(model)).vocab_size
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise InvalidArgumentError(
                f"{wrong} is no token id of {model!r}; its vocabulary ends at {vocab_size - 1}", field="tokens"
            )
        engine = await self._loaded(model)
        return await engine.engine.detokenize(token_ids, skip_special_tokens=skip_special_tokens)

    async def token_texts(self, model: str, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return await (await self._loaded(model)).engine.token_texts(token_ids)

    # ---- information ----------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests in the queue in front of the engines."""
        return self._admission.num_waiting

    def num_waiting_by_model(self) -> dict[str, int]:
        """The same, by the model that is asked for; without those that nobody waits for."""
        return self._admission.num_waiting_by_model()

    async def health_check(self) -> bool:
        """Whether at least one engine takes requests and answers."""
        ready = [engine.engine for engine in self._engines.values() if engine.state is EngineState.READY]
        return any(await asyncio.gather(*(engine.health_check() for engine in ready)))

    async def engine_stats(self) -> dict[str, EngineStats]:
        """The counters of each engine that is loaded and answers, by id."""
        loaded = [engine for engine in self._engines.values() if engine.is_loaded]
        stats = await asyncio.gather(*(_stats_of(engine) for engine in loaded))
        return {engine.engine_id: stat for engine, stat in zip(loaded, stats, strict=True) if stat is not None}

    def get_status(self) -> dict[str, Any]:
        """Engines and queue at this moment, as plain JSON values."""
        engines = {
            info.engine_id: {
                "state": info.state.value,
                "model": info.model,
                "num_requests": info.num_requests,
                "error": info.error,
            }
            for info in self.list_engines()
        }
        return {"engines": engines, "num_waiting": self._admission.num_waiting}

    def get_metrics(self) -> ControlPlaneMetrics:
        """Figures since the start; zeros before the first request."""
        totals, elapsed = self._totals, max(self._clock() - self._started_at, 1e-9)
        count = max(totals.num_requests, 1)
        ready = [engine for engine in self._engines.values() if engine.state is EngineState.READY]
        num_places = sum(engine.instance.max_concurrent_requests for engine in ready)
        return ControlPlaneMetrics(
            throughput=totals.num_output_tokens / elapsed,
            requests_per_second=totals.num_requests / elapsed,
            avg_latency=totals.latency_s / count,
            avg_ttft_ms=totals.ttft_ms / count,
            gpu_utilization=sum(engine.num_requests for engine in ready) / num_places if num_places else 0.0,
            cache_hit_rate=totals.num_cached_tokens / max(totals.num_prompt_tokens, 1),
            error_rate=totals.num_failed / count,
            num_requests=totals.num_requests,
            num_waiting=self._admission.num_waiting,
        )

    # ---- steps of the above ---------------------------------------------------------------------------

    async def _loaded(self, model: str) -> ManagedEngine:
        """An engine that has the model in memory; one is started where there is none."""
        if self._is_stopped:
            raise UnavailableError("the control plane was stopped; call start() first")
        serving = self._admission.serving(model)
        for engine in serving:
            if engine.is_loaded:
                return engine
        await asyncio.shield(serving[0].start(self._admission.dispatch))
        return serving[0]

    def _check_new(self, engine_id: str) -> None:
        if engine_id in self._engines:
            raise InvalidArgumentError(
                f"an engine {engine_id!r} is registered already; choose another id", field="engine_id"
            )

    def _add(self, instance: ExecutionInstance, engine: Engine) -> None:
        self._check_new(instance.instance_id)
        self._engines[instance.instance_id] = ManagedEngine(instance, engine)

    def _engine(self, engine_id: str) -> ManagedEngine:
        if engine_id not in self._engines:
            known = ", ".join(self._engines) or "none"
            raise NotFoundError(f"no engine {engine_id!r}; registered: {known}", engine_id=engine_id)
        return self._engines[engine_id]

    def _staying(self, engine_id: str) -> ManagedEngine:
        """An engine that is not on its way out."""
        engine = self._engine(engine_id)
        if engine_id in self._leaving:
            raise UnavailableError(f"{engine_id} is being taken away; register a new engine", engine_id=engine_id)
        return engine

    def _accept(self, request: Request) -> Request:
        if self._is_stopped:
            raise UnavailableError("the control plane was stopped; call start() first")
        return request


async def _stats_of(engine: ManagedEngine) -> EngineStats | None:
    """None for an engine that stops in this moment."""
    try:
        return await engine.engine.stats()
    except UnavailableError:
        return None


def _free_name(taken: Mapping[str, object]) -> str:
    return next(name for number in itertools.count() if (name := f"engine-{number}") not in taken)


def _mark_late(response: Response, ticket: Ticket) -> Response:
    """A response that was aborted because of its deadline says so."""
    if not ticket.is_late or response.error is not None:
        return response
    return response.model_copy(update={"error": ticket.deadline_error().to_error()})
