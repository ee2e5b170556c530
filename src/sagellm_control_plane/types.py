"""What the control plane knows of engines: instances, their kinds, states and figures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pydantic import Field

from sagellm_protocol import Request, RequestPriority, Response, StreamEventEnd
from sagellm_protocol.model import EdgeModel, ProtocolEnum

__all__ = [
    "ControlPlaneMetrics",
    "EngineInfo",
    "EngineState",
    "ExecutionInstance",
    "ExecutionInstanceType",
    "PerformanceTotals",
    "RequestPriority",
    "RequestType",
]


class EngineState(ProtocolEnum):
    """Life of an engine under the control plane; one that was never started is STOPPED."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    ERROR = "error"


class RequestType(ProtocolEnum):
    """What a request asks of an engine."""

    LLM_GENERATE = "llm_generate"
    LLM_CHAT = "llm_chat"
    EMBEDDING = "embedding"

    @classmethod
    def of(cls, request: Request) -> RequestType:
        """The kind of a request."""
        if request.embed is not None:
            return _EMBEDDING
        return _GENERATE if request.messages is None else _CHAT


_GENERATE, _CHAT, _EMBEDDING = RequestType  # to look into an enumeration takes longer than the rest of `of`


class ExecutionInstanceType(IntEnum):
    """What an instance is meant for.

    PREFILLING and DECODING take requests for text, EMBEDDING those for vectors, the others both.
    """

    GENERAL = 0
    PREFILLING = 1
    DECODING = 2
    HYBRID = 3
    EMBEDDING = 4
    LLM_EMBEDDING = 5


class ExecutionInstance(EdgeModel):
    """An engine that requests can be sent to, as its operator describes it.

    The parallel sizes and `gpu_count` describe the hardware the instance was planned for; an engine in this
    process runs on one device whatever they say.
    """

    instance_id: str = Field(min_length=1)
    model_name: str = Field(default="builtin", min_length=1)
    instance_type: ExecutionInstanceType = ExecutionInstanceType.GENERAL
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    gpu_count: int = Field(default=1, ge=0)
    max_concurrent_requests: int = Field(default=32, ge=1)
    price_per_hour: float = Field(default=0.0, ge=0, description="in any one currency, for `cost_optimized`")
    location: str = Field(default="", description="zone/rack/host, outermost first, for routing `topology`")
    memory_bytes: int | None = Field(
        default=None, ge=1, description="that its model takes; None: by files, then measured"
    )


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine at this moment."""

    engine_id: str
    model: str
    instance_type: ExecutionInstanceType
    state: EngineState
    num_requests: int  # in flight
    max_model_len: int
    num_tokens: int = 0  # prompt and expected output tokens of those in flight
    error: str | None = None
    pid: int | None = None  # of its process, where that is one of its own


@dataclass(slots=True)
class PerformanceTotals:
    """Sums over finished requests, from which `ControlPlaneMetrics` are made."""

    num_requests: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    latency_s: float = 0.0
    ttft_ms: float = 0.0

    def add(self, response: Response | StreamEventEnd, latency_s: float) -> None:
        """Count one finished request."""
        usage = response.usage.__dict__  # every attribute of a pydantic value costs about as much as this
        self.num_requests += 1
        self.num_failed += response.error is not None
        self.num_output_tokens += usage["completion_tokens"]
        self.num_prompt_tokens += usage["prompt_tokens"]
        self.num_cached_tokens += usage["cached_tokens"]
        self.latency_s += latency_s
        self.ttft_ms += response.metrics.ttft_ms

    def metrics(self, elapsed_s: float, *, num_running: int, num_places: int, num_waiting: int) -> ControlPlaneMetrics:
        """The figures of `elapsed_s` seconds."""
        elapsed_s, count = max(elapsed_s, 1e-9), max(self.num_requests, 1)
        return ControlPlaneMetrics(
            throughput=self.num_output_tokens / elapsed_s,
            requests_per_second=self.num_requests / elapsed_s,
            avg_latency=self.latency_s / count,
            avg_ttft_ms=self.ttft_ms / count,
            gpu_utilization=num_running / num_places if num_places else 0.0,
            cache_hit_rate=self.num_cached_tokens / max(self.num_prompt_tokens, 1),
            error_rate=self.num_failed / count,
            num_requests=self.num_requests,
            num_waiting=num_waiting,
        )


@dataclass(frozen=True, slots=True)
class ControlPlaneMetrics:
    """Figures since the manager started. Times in seconds unless the name says otherwise."""

    throughput: float  # output tokens a second
    requests_per_second: float
    avg_latency: float
    avg_ttft_ms: float
    gpu_utilization: float  # share of the engines' places in use now, 0..1
    cache_hit_rate: float  # of prompt tokens
    error_rate: float
    num_requests: int
    num_waiting: int
