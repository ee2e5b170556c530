"""`ControlPlaneManager`: engines behind one door; requests queue by policy and are routed to a free engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sagellm_control_plane.admission import Admission
from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.clock import Clock, LoopClock
from sagellm_control_plane.config import ControlPlaneConfig, ParallelismConfig, PDSeparationConfig
from sagellm_control_plane.dispatch import Dispatcher
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.events import EventHub, EventKind
from sagellm_control_plane.explain import RequestTrace, TraceRing
from sagellm_control_plane.pd import PhaseRouter
from sagellm_control_plane.policies import PolicyContext, get_policy
from sagellm_control_plane.pool import EnginePool
from sagellm_control_plane.registry import EngineRegistry, MakeEngine
from sagellm_control_plane.routing import get_router
from sagellm_control_plane.runner import Runner
from sagellm_control_plane.sampling import as_sampling_params
from sagellm_control_plane.scaling import Scaling
from sagellm_control_plane.store import EngineStore
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
    TokenizeRequest,
    UnavailableError,
)

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import EngineStats

logger = logging.getLogger(__name__)


def local_engine(config: LLMEngineConfig) -> EngineClient:
    """An engine in this process."""
    # Imported here because it brings torch.
    from sagellm_core.llm_engine import LLMEngine

    return LLMEngine(config)


class ControlPlaneManager:
    """Starts engines and spreads requests over them.

    >>> manager = ControlPlaneManager(engine_configs=[EngineConfig(kind="cpu", model="builtin")])
    >>> await manager.start()
    >>> response = await manager.execute_request(prompt="Hello", max_tokens=128)
    >>> await manager.stop()

    Belongs to one event loop. Engines that were not started start with the first request for their model. `make_engine`
    makes those that are given as configurations or instances: in this process (`local_engine`), or as a child process
    (`ProcessEngineClient`). With `state`, a file, the next manager that is given it finds the engines that were added
    and what was wanted of each, and takes over the child processes that still run. `config` holds everything that can
    be set; the keywords before it stand for its fields of the same name and win over it.
    """

    def __init__(
        self,
        backend_config: BackendConfig | None = None,
        engine_configs: Sequence[EngineConfig] = (),
        *,
        scheduling_policy: str | None = None,
        routing_policy: str | None = None,
        enable_pd_separation: bool = False,
        pd_config: PDSeparationConfig | None = None,
        parallelism_config: ParallelismConfig | None = None,
        max_num_waiting: int | None = None,
        config: ControlPlaneConfig | None = None,
        make_engine: MakeEngine = local_engine,
        state: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        given = {
            "scheduling_policy": scheduling_policy,
            "routing_policy": routing_policy,
            "max_num_waiting": max_num_waiting,
            "pd": (pd_config or PDSeparationConfig()) if enable_pd_separation else None,
        }
        base = config or ControlPlaneConfig()
        self.config = base.model_copy(update={name: value for name, value in given.items() if value is not None})
        self.backend_config = backend_config or BackendConfig()
        self.parallelism_config = parallelism_config or ParallelismConfig()
        self._clock = clock or LoopClock()
        self._totals = PerformanceTotals()
        self._started_at = self._clock.now()
        self._is_stopped = False
        self._store = None if state is None else EngineStore(state)
        self.events = EventHub(self._clock, self.config.num_events)
        self._traces = TraceRing(self.config.num_traces)
        self._build(make_engine)
        for engine_config in engine_configs:
            self.register_config(engine_config)

    def _build(self, make_engine: MakeEngine) -> None:
        config, pd = self.config, self.config.pd
        self._pool = EnginePool(
            config,
            self._clock,
            self.events,
            store=self._store,
            on_change=lambda: self._dispatcher.engines_changed(),
            on_removed=lambda row: self._router.on_engine_removed(row),
        )
        context = PolicyContext(
            self._pool.predictor, self._pool.fleet, config.policy_options, on_switch=self._policy_switched
        )
        policy = get_policy(config.scheduling_policy)(context)
        name = config.routing_policy or (pd.routing_policy if pd is not None else "adaptive")
        self._router = get_router(name)(self._pool.routing)
        phases = PhaseRouter(pd, self._pool) if pd is not None and pd.enabled else None
        self._dispatcher = Dispatcher(
            self._pool, policy, self._router, phases, max_num_waiting=config.max_num_waiting, clock=self._clock
        )
        admission = Admission(self._pool, self._dispatcher, policy, self._router, self._traces, config, self._clock)
        self._runner = Runner(
            admission, self._dispatcher, phases, self._pool, self._totals, self.events, config, self._clock
        )
        self._registry = EngineRegistry(self._pool, make_engine, self.backend_config, self._store)
        self._scaling = Scaling(
            config.autoscaling,
            self._pool,
            lambda model, engine_id: self._registry.make(self.allowed_models[model], engine_id),
            lambda model: self.num_waiting_by_model().get(model, 0),
            self.events,
            self._clock,
        )

    @property
    def allowed_models(self) -> dict[str, EngineConfig]:
        """Configurations that further engines may be made of, by model: the first of each."""
        return self._registry.allowed

    @property
    def pd_config(self) -> PDSeparationConfig | None:
        """How prefill and decode are separated; None: not at all."""
        return self.config.pd

    # ---- engines --------------------------------------------------------------------------------------

    def register_config(self, config: EngineConfig, **fields: Any) -> str:
        """Add an engine by configuration; returns its id. It loads as `register_instance` says.

        `fields` are further ones of its `ExecutionInstance`, such as `instance_type` or `price_per_hour`. Further
        engines may be made of the first configuration of each model, see `allowed_models`.
        """
        return self._registry.add_config(config, **fields)

    def register_instance(self, instance: ExecutionInstance) -> None:
        """Add an engine by description; it loads when the manager starts or a request comes."""
        self._registry.add_instance(instance)

    def register_engine(self, engine: EngineClient, *, engine_id: str | None = None, model: str | None = None) -> str:
        """Add an engine object; returns its id. `model` is the name it is asked by."""
        return self._registry.add_client(engine, engine_id, model)

    async def replace_model(self, model: str, config: EngineConfig) -> list[str]:
        """New engines of `config` in the place of all that serve `model`, one after the other; returns their ids.

        They answer to the name `model`, whatever `config` is called. Each is ready before its old one takes no more
        requests, and that one's requests end undisturbed; the call is over when the last old engine has left. With a
        `state` the next manager runs the new configuration, too, until the one that it is given changes.

        Raises `NotFoundError` where no engine serves the model, `UnavailableError` where it is being replaced already,
        and what kept a new engine from its start: then the old engines that are left stay in service.
        """
        self._check_running()
        return await self._registry.replace(model, config)

    async def unregister_engine(self, engine_id: str) -> None:
        """Take no more requests for an engine, let those in flight end, then stop it."""
        await self._pool.supervisor.remove(engine_id)

    def start_engine(self, engine_id: str) -> asyncio.Future[None]:
        """Begin to load an engine, or let one that was drained take requests again; done when it is ready.

        Raises `UnavailableError` for an engine that is being unregistered.
        """
        return self._pool.supervisor.start(engine_id)

    def drain_engine(self, engine_id: str) -> asyncio.Future[None]:
        """Take no more requests for an engine until `start_engine`; done when those in flight have ended.

        The model stays loaded.
        """
        return self._pool.supervisor.hold(engine_id)

    async def stop_engine(self, engine_id: str) -> None:
        """End an engine's requests with `abort` and free its model; it stays out until `start_engine`."""
        await self._pool.supervisor.stop(engine_id)

    async def reset_prefix_cache(self) -> dict[str, bool]:
        """Forget all cached prefixes of the loaded engines, by id; False where requests hold blocks."""
        return await self._pool.reset_prefix_caches()

    def list_engines(self) -> list[EngineInfo]:
        """All engines at this moment."""
        return [self._pool.info(engine) for engine in self._pool.engines]

    def get_engine(self, engine_id: str) -> EngineInfo:
        """One engine at this moment; `NotFoundError` for an unknown id."""
        return self._pool.info(self._pool.get(engine_id))

    def model_of(self, engine_id: str) -> str:
        """The name of an engine's model; empty for an unknown id."""
        return self._pool.get(engine_id).instance.model_name if engine_id in self._pool else ""

    def get_engine_config(self, engine_id: str) -> LLMEngineConfig:
        """What one engine runs with; `NotFoundError` for an unknown id."""
        return self._pool.get(engine_id).client.config

    def get_engine_details(self, engine_id: str) -> dict[str, Any]:
        """Model, device, memory and kernels, as `LLMEngine.get_info` has them; `NotFoundError` for an unknown id."""
        return self._pool.get(engine_id).client.get_info()

    async def start(self) -> None:
        """Load all engines. Raises the first error where none could start; otherwise what failed is in its info.

        With a `state` the first start goes on where the last manager ended: what was held or stopped stays so.
        """
        self._is_stopped = False
        goes_on = self._store is not None and not self._registry.is_running
        self._registry.is_running = True
        if self._store is not None and goes_on:
            await self._registry.restore(self._store)
        if not self._pool.engines:
            raise InvalidArgumentError("no engine is registered; give engine_configs or call register_instance first")
        unknown = next((model for model in self.config.autoscaling if model not in self.allowed_models), None)
        if unknown is not None:
            known = ", ".join(self.allowed_models) or "none"
            raise InvalidArgumentError(
                f"autoscaling names {unknown!r}, which no engine_config has; configured: {known}", field="autoscaling"
            )
        errors = await self._pool.supervisor.start_all(except_held=goes_on)
        first = next(iter(errors), None)
        if first is not None and all(error is not None for error in errors):
            raise first
        self._scaling.start()

    async def stop(self, *, leave_children: bool = False) -> None:
        """Stop all engines; their requests end with the finish reason `abort`, waiting ones are refused.

        `leave_children`: let child processes run on for the next manager with the same `state`.
        """
        self._is_stopped = True
        self._scaling.stop()
        self._dispatcher.refuse_all(UnavailableError("the control plane was stopped"))
        await (self._pool.supervisor.leave_running() if leave_children else self._pool.supervisor.stop_all())

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

        Raises `NotFoundError` for a model that no engine serves, `ResourceExhaustedError` where the queue is full or
        the request's deadline out of reach (with `retry_after_s` in its context), `UnavailableError` where no engine
        runs, `DeadlineExceededError` where the deadline passed in the queue.
        """
        return await self._runner.execute(self._accept(request or Request(**fields)))

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

    def stream_request(self, request: Request | None = None, **fields: Any) -> AsyncGenerator[StreamEvent, None]:
        """The answer as it is made: one start, deltas, exactly one end. Leaving the loop frees the request.

        An engine that is lost in its midst is replaced by another one, which goes on behind the last token.
        """
        return self._runner.stream(self._accept(request or Request(**{"stream": True, **fields})))

    # ---- models ---------------------------------------------------------------------------------------

    async def describe_model(self, model: str) -> ModelDescription:
        """What a model is; its engine starts if it has to. Raises `NotFoundError` for one that no engine serves."""
        engine = await self._loaded(model)
        assert engine.description is not None, "engines are described when they start"
        return engine.description

    async def tokenize(self, model: str, **fields: Any) -> list[int]:
        """The token ids of a text or a conversation; `fields` are those of `TokenizeRequest`."""
        return await (await self._loaded(model)).client.tokenize(TokenizeRequest(**fields))

    async def detokenize(self, model: str, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`; `InvalidArgumentError` for an id that the model does not have."""
        vocab_size = (await self.describe_model(model)).vocab_size
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise InvalidArgumentError(
                f"{wrong} is no token id of {model!r}; its vocabulary ends at {vocab_size - 1}", field="tokens"
            )
        engine = await self._loaded(model)
        return await engine.client.detokenize(token_ids, skip_special_tokens=skip_special_tokens)

    async def token_texts(self, model: str, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return await (await self._loaded(model)).client.token_texts(token_ids)

    # ---- information ----------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """The longest context of all engines, in tokens; 0 without any."""
        return self._pool.max_model_len

    @property
    def num_waiting(self) -> int:
        """Requests in the queue in front of the engines."""
        return self._dispatcher.num_waiting

    def num_waiting_by_model(self) -> dict[str, int]:
        """The same, by the model that is asked for; without those that nobody waits for."""
        return self._dispatcher.num_waiting_by_model()

    def explain(self, request_id: str) -> RequestTrace:
        """Why a request went where it went, and when; `NotFoundError` for one that was never seen or is forgotten."""
        trace = self._traces.get(request_id)
        if trace is None:
            raise NotFoundError(
                f"nothing is known of the request {request_id!r}; the last {self.config.num_traces} are kept "
                "(control_plane.num_traces)",
                request_id=request_id,
            )
        return trace

    def recent_requests(self, limit: int = 100) -> list[RequestTrace]:
        """The last requests that came, newest first."""
        return self._traces.recent(limit)

    async def health_check(self) -> bool:
        """Whether at least one engine takes requests and answers."""
        return await self._pool.health_check()

    async def engine_stats(self) -> dict[str, EngineStats]:
        """The counters of each engine that is loaded and answers, by id."""
        return await self._pool.stats()

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
        return {"engines": engines, "num_waiting": self._dispatcher.num_waiting}

    def get_metrics(self) -> ControlPlaneMetrics:
        """Figures since the start; zeros before the first request."""
        ready = [engine for engine in self._pool.engines if engine.state is EngineState.READY]
        return self._totals.metrics(
            self._clock.now() - self._started_at,
            num_running=sum(engine.num_requests for engine in ready),
            num_places=sum(engine.instance.max_concurrent_requests for engine in ready),
            num_waiting=self._dispatcher.num_waiting,
        )

    # ---- steps of the above ---------------------------------------------------------------------------

    async def _loaded(self, model: str) -> ManagedEngine:
        """An engine that has the model in memory; one is started where there is none."""
        self._check_running()
        return await self._pool.loaded(model)

    def _check_running(self) -> None:
        if self._is_stopped:
            raise UnavailableError("the control plane was stopped; call start() first")

    def _accept(self, request: Request) -> Request:
        self._check_running()
        return request

    def _policy_switched(self, old: str, new: str, reason: str) -> None:
        self.events.publish(EventKind.POLICY, f"scheduling by {new} instead of {old}: {reason}", old=old, new=new)
