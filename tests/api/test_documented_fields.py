"""Fields, enumerations, signatures, routes and flags that users' scripts rely on, one by one."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel

import sagellm_protocol as protocol
from sagellm_protocol import DType, InvalidArgumentError, SamplingParams

FIELDS: dict[str, str] = {
    "Request": (
        "request_id trace_id model prompt max_tokens stream temperature top_p kv_budget_tokens metadata phase "
        "sampling_params priority slo"
    ),
    "Response": "request_id trace_id output_text output_tokens finish_reason metrics error",
    "StreamEventStart": "event request_id trace_id engine_id prompt_tokens",
    "StreamEventDelta": "event request_id trace_id engine_id chunk chunk_tokens",
    "StreamEventEnd": "event request_id trace_id engine_id output_text output_tokens finish_reason metrics error",
    "Metrics": (
        "ttft_ms tbt_ms tpot_ms throughput_tps peak_mem_mb error_rate kv_used_tokens kv_used_bytes prefix_hit_rate "
        "evict_count evict_ms spec_accept_rate prefill_ms decode_ms kv_transfer_count kv_transfer_bytes kv_transfer_ms "
        "comm_overhead_ms allreduce_count allgather_count itl_list timestamps"
    ),
    "Timestamps": "queued_at scheduled_at executed_at completed_at",
    "Error": "code message retryable",
    "CapabilityDescriptor": (
        "device_name device_type compute_capability total_memory_bytes available_memory_bytes supported_dtypes "
        "supported_kernels has_stream has_event has_collective has_graph_exec"
    ),
    "SamplingParams": (
        "strategy temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty length_penalty "
        "num_beams penalty_alpha max_tokens min_tokens stop stop_token_ids ignore_eos seed n logprobs logit_bias "
        "skip_special_tokens"
    ),
}

VALUES: dict[str, str] = {
    "ErrorCode": (
        "invalid_argument resource_exhausted unavailable deadline_exceeded not_implemented kv_transfer_failed "
        "comm_timeout comm_group_invalid distributed_runtime_error unauthenticated permission_denied not_found "
        "cancelled internal"
    ),
    "FinishReason": "stop length error abort",
    "DecodingStrategy": "greedy sampling beam_search contrastive",
    "SamplingPreset": "deterministic balanced creative precise",
    "DType": "fp32 fp16 bf16 fp8 int8 int4",
}


@pytest.mark.parametrize("name", FIELDS)
def test_models_have_the_documented_fields(name: str) -> None:
    model: type[BaseModel] = getattr(protocol, name)
    assert set(FIELDS[name].split()) <= set(model.model_fields)


@pytest.mark.parametrize("name", VALUES)
def test_enumerations_have_the_documented_values(name: str) -> None:
    enumeration: type[Enum] = getattr(protocol, name)
    assert {member.value for member in enumeration} == set(VALUES[name].split())
    assert {member.name.lower() for member in enumeration} == set(VALUES[name].split())


def test_requests_take_what_is_documented() -> None:
    from sagellm_protocol import Request

    first, second = Request(prompt="hello"), Request(prompt=[5, 6])
    assert first.request_id != second.request_id
    assert first.trace_id != second.trace_id
    for phase in ("prefill", "decode", None):
        assert Request(prompt="hello", phase=phase).phase == phase
    for wrong in ({"max_tokens": 0}, {"phase": "dream"}, {"no_such_field": 1}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            Request.model_validate({"prompt": "hello", **wrong})


def test_sampling_parameters_take_none_where_documented() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("stop", "stop_token_ids", "seed", "logprobs", "logit_bias"))
    params = SamplingParams(**nothing)
    assert not params.stop
    assert not params.stop_token_ids
    assert not params.logit_bias
    for preset in protocol.SamplingPreset:
        assert isinstance(SamplingParams.from_preset(preset), SamplingParams)


def test_the_sampling_module_holds_its_names() -> None:
    from sagellm_protocol import sampling

    for name in ("DecodingStrategy", "SamplingPreset", "SamplingParams"):
        assert getattr(sampling, name) is getattr(protocol, name)


def test_every_stream_event_reads_back() -> None:
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(protocol.StreamEvent)
    common = {"request_id": "r", "trace_id": "t", "engine_id": "e"}
    bodies = [
        {"event": "start", **common, "prompt_tokens": 3},
        {"event": "delta", **common, "chunk": "a", "chunk_tokens": [5]},
        {"event": "end", **common, "output_text": "a", "output_tokens": [5], "finish_reason": "stop", "metrics": {}},
    ]
    events = [adapter.validate_json(json.dumps(body)) for body in bodies]
    assert [event.event for event in events] == ["start", "delta", "end"]


def test_the_exception_carries_what_is_documented() -> None:
    error = protocol.SageLLMError("no; do this", code="unavailable", retryable=True, context={"a": 1})
    assert (error.code, error.message, error.retryable, error.context) == ("unavailable", "no; do this", True, {"a": 1})


# ---- backend ----------------------------------------------------------------------------------------------


def test_providers_have_the_documented_methods() -> None:
    from sagellm_backend import BackendProvider

    names = "capability memory_info create_stream create_event kv_block_alloc kv_block_free copy get_kernel "
    names += "register_kernel"
    assert all(callable(getattr(BackendProvider, name)) for name in names.split())
    assert inspect.isabstract(BackendProvider)


def test_auto_tries_the_backends_in_the_documented_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_backend import get_provider, registry
    from sagellm_protocol import UnavailableError

    tried: list[str] = []

    def refuse(kind: str) -> Any:
        def create(**_: object) -> None:
            raise UnavailableError(f"no {kind} here; buy one")

        tried.append(kind)
        return create

    monkeypatch.setattr(registry, "_factory", refuse)
    with pytest.raises(UnavailableError):
        get_provider()
    assert tried == ["cuda", "ascend", "kunlun", "haiguang", "cpu"]


async def test_the_transformers_engine_configuration() -> None:
    from sagellm_backend.engine.hf_cuda import HFCudaEngine, HFCudaEngineConfig
    from sagellm_protocol import Request, UnavailableError

    required = {
        "engine_id": "hf",
        "model_path": "some/model",
        "device": "cuda:0",
        "dtype": "fp16",
        "max_new_tokens": 4,
        "max_batch_size": 1,
    }
    for name in required:
        with pytest.raises(InvalidArgumentError, match=name):
            HFCudaEngineConfig.model_validate({key: value for key, value in required.items() if key != name})
    with pytest.raises(InvalidArgumentError, match="load_in_4bit"):
        HFCudaEngineConfig.model_validate({**required, "load_in_8bit": True, "load_in_4bit": True})
    config = HFCudaEngineConfig.model_validate(required)
    assert (config.device_map, config.trust_remote_code, config.mock_mode) == (None, False, False)
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="mock_mode"):
            await HFCudaEngine(config).start()
    engine = HFCudaEngine(HFCudaEngineConfig.model_validate({**required, "mock_mode": True}), provider=None)
    await engine.start()
    response = await engine.execute(Request(prompt="one two three"))
    events = [event async for event in engine.stream(Request(prompt="one two three"))]
    await engine.stop()
    assert response.error is None
    assert (events[0].event, events[-1].event) == ("start", "end")


# ---- core -------------------------------------------------------------------------------------------------


def test_engine_arguments_are_keywords_with_the_documented_defaults() -> None:
    from sagellm_core import LLMEngine

    for method in ("generate", "stream"):
        parameters = inspect.signature(getattr(LLMEngine, method)).parameters
        for name in ("sampling_params", "max_tokens", "request_id"):
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[name].default is None
    assert inspect.isasyncgenfunction(LLMEngine.stream)
    config, *others = inspect.signature(LLMEngine).parameters.values()
    assert config.name == "config"
    for parameter in others:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is None
    assert hasattr(LLMEngine, "__aenter__")


def test_the_scheduler_has_two_names() -> None:
    import sagellm_core

    assert sagellm_core.ContinuousBatchingScheduler is sagellm_core.Scheduler
    fields = set(sagellm_core.SchedulerOutput.__dataclass_fields__)
    assert {"batch_type", "block_tables", "slot_mapping", "context_lens", "query_start_loc"} <= fields


def test_every_strategy_is_a_base_decoding_strategy() -> None:
    from sagellm_core.decoding import BaseDecodingStrategy, get_strategy

    for strategy in protocol.DecodingStrategy:
        assert isinstance(get_strategy(strategy), BaseDecodingStrategy)


def test_configurations_are_read_from_yaml_and_json(tmp_path: Any) -> None:
    from sagellm_core import load_config

    (tmp_path / "c.yaml").write_text("engine: {model_path: builtin}\n")
    (tmp_path / "c.json").write_text('{"engine": {"model_path": "builtin"}}')
    assert load_config(tmp_path / "c.yaml") == load_config(str(tmp_path / "c.json"))


# ---- control plane ----------------------------------------------------------------------------------------


def test_control_plane_types() -> None:
    import sagellm_control_plane as plane

    assert {state.name for state in plane.EngineState} == {"STARTING", "READY", "DRAINING", "STOPPED", "ERROR"}
    assert [priority.name for priority in sorted(plane.RequestPriority)][:: len(plane.RequestPriority) - 1] == [
        "CRITICAL",
        "BACKGROUND",
    ]
    kinds = "GENERAL PREFILLING DECODING HYBRID EMBEDDING LLM_EMBEDDING"
    assert {kind.name for kind in plane.ExecutionInstanceType} == set(kinds.split())


def test_control_plane_methods_and_policies() -> None:
    from sagellm_control_plane import ControlPlaneManager

    names = "start stop execute_request process_request stream_request register_instance register_engine "
    names += "unregister_engine list_engines get_engine get_status get_metrics"
    assert all(callable(getattr(ControlPlaneManager, name)) for name in names.split())
    for policy in ("fifo", "priority", "slo_aware", "cost_optimized", "adaptive"):
        assert ControlPlaneManager(scheduling_policy=policy).list_engines() == []


def test_the_umbrella_exports_no_engines() -> None:
    import sagellm

    assert not [name for name in ("LLMEngine", "EngineFactory", "LLMEngineConfig") if hasattr(sagellm, name)]


# ---- servers and command line -----------------------------------------------------------------------------


def routes(application: Any) -> set[tuple[str, str]]:
    """(method, path) of every operation that an application describes."""
    paths = application.openapi()["paths"]
    return {(method.upper(), path) for path, operations in paths.items() for method in operations}


def test_gateway_and_engine_server_routes() -> None:
    from sagellm_control_plane import ControlPlaneManager
    from sagellm_core import engine_server_app
    from sagellm_gateway.app import create_app

    gateway = routes(create_app(ControlPlaneManager()))
    assert {("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models")} <= gateway
    assert {("GET", "/health"), ("GET", "/metrics")} <= gateway
    engine = routes(engine_server_app)
    assert {("POST", "/v1/completions"), ("POST", "/v1/completions/stream")} <= engine
    assert {("GET", "/health"), ("GET", "/info"), ("GET", "/metrics")} <= engine


@pytest.mark.parametrize("accelerator", ["cuda", "ascend", "kunlun", "haiguang", "cpu"])
@pytest.mark.parametrize("flags", [[], ["--github"]])
def test_install_knows_every_accelerator(accelerator: str, flags: list[str]) -> None:
    from typer.testing import CliRunner

    from sagellm.cli import app

    result = CliRunner().invoke(app, ["install", accelerator, *flags], input="n\n")
    assert "pip install" in result.output


HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "tokenizers", "numpy", "rich", "yaml")


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import sagellm", (*HEAVY, "pydantic")),
        ("import sagellm.cli", HEAVY),
        ("import sagellm_protocol", HEAVY),
        ("import sagellm_core, sagellm_backend, sagellm_control_plane, sagellm_gateway", HEAVY),
    ],
)
def test_imports_are_light(statement: str, heavy: tuple[str, ...]) -> None:
    """What makes `import sagellm` and `sage-llm --help` instant, without a clock."""
    code = f"import sys\n{statement}\nprint(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


def test_dtypes_are_exported_by_the_backend_too() -> None:
    import sagellm_backend

    assert sagellm_backend.DType is DType
