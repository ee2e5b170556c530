"""The names, signatures and snippets that users' scripts rely on work as documented."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

NAMES = {
    "sagellm": "BackendConfig ControlPlaneManager EngineConfig",
    "sagellm_protocol": (
        "Request Response StreamEvent StreamEventStart StreamEventDelta StreamEventEnd Metrics Timestamps Error "
        "ErrorCode SageLLMError SamplingParams SamplingPreset DecodingStrategy DType KernelKind CapabilityDescriptor "
        "KVHandle KVBlock KVTransferMetadata KVAllocateParams KVErrorCode"
    ),
    "sagellm_backend": (
        "BackendProvider CPUBackendProvider CudaBackendProvider AscendBackendProvider KunlunBackendProvider "
        "HaiguangBackendProvider MockBackendProvider DType get_provider"
    ),
    "sagellm_backend.engine.hf_cuda": "HFCudaEngine HFCudaEngineConfig",
    "sagellm_core": (
        "LLMEngine LLMEngineConfig EngineCore Scheduler ContinuousBatchingScheduler SchedulerOutput Executor Worker "
        "ModelRunner load_config DemoConfig create_backend BackendConfig EngineFactory engine_server_app __version__"
    ),
    "sagellm_core.decoding": "BaseDecodingStrategy",
    "sagellm_core.pd_executor": "PDExecutor",
    "sagellm_core.runtime": "PDRuntime",
    "sagellm_control_plane": (
        "ControlPlaneManager ExecutionInstance ExecutionInstanceType PDSeparationConfig ParallelismConfig EngineState "
        "RequestPriority RequestType"
    ),
    "sagellm_gateway": "",
    "sagellm_comm": "",
    "sagellm_kv_cache": "",
    "sagellm_compression": "",
    "sagellm_benchmark": "",
}


@pytest.mark.parametrize("module", NAMES)
def test_documented_names_are_there(module: str) -> None:
    package = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(package, name)]
    assert not missing


def test_engine_configuration_has_the_documented_defaults() -> None:
    from sagellm_core import LLMEngineConfig

    config = LLMEngineConfig(model_path="builtin")
    expected = {
        "backend_type": "auto",
        "comm_type": "auto",
        "max_batch_size": 32,
        "max_model_len": 4096,
        "max_new_tokens": 128,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "dtype": "auto",
        "trust_remote_code": False,
        "engine_id": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_engine_methods_take_the_documented_arguments() -> None:
    from sagellm_core import LLMEngine

    generate = inspect.signature(LLMEngine.generate).parameters
    assert {"prompt", "sampling_params", "max_tokens", "request_id"} <= set(generate)
    stream = inspect.signature(LLMEngine.stream).parameters
    assert {"prompt_or_request", "max_tokens", "request_id", "sampling_params"} <= set(stream)
    for name in ("start", "stop", "execute", "health_check"):
        assert inspect.iscoroutinefunction(getattr(LLMEngine, name))
    assert inspect.isfunction(LLMEngine.get_info)


def test_sampling_parameters_have_the_documented_defaults() -> None:
    from sagellm_protocol import DecodingStrategy, SamplingParams, SamplingPreset

    params = SamplingParams()
    expected: dict[str, Any] = {
        "strategy": DecodingStrategy.GREEDY,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "length_penalty": 1.0,
        "num_beams": 1,
        "penalty_alpha": 0.6,
        "max_tokens": 128,
        "min_tokens": 0,
        "ignore_eos": False,
        "seed": None,
        "n": 1,
        "logprobs": None,
        "skip_special_tokens": True,
    }
    assert {name: getattr(params, name) for name in expected} == expected
    assert {strategy.name for strategy in DecodingStrategy} == {"GREEDY", "SAMPLING", "BEAM_SEARCH", "CONTRASTIVE"}
    assert {preset.name for preset in SamplingPreset} == {"DETERMINISTIC", "BALANCED", "CREATIVE", "PRECISE"}


def test_the_mock_backend_snippet() -> None:
    from sagellm_backend import CPUBackendProvider, DType, MockBackendProvider

    backend = MockBackendProvider(supported_dtypes=[DType.FP16, DType.BF16], has_collective=True)
    capability = backend.capability()
    block = backend.kv_block_alloc(128, DType.FP16)
    assert capability.has_collective
    assert set(capability.supported_dtypes) == {DType.FP16, DType.BF16}
    assert (block.num_tokens, block.dtype) == (128, DType.FP16)
    backend.kv_block_free(block)
    assert CPUBackendProvider().capability().device_type == "cpu"


def test_the_small_factories() -> None:
    from sagellm_core import BackendConfig, DemoConfig, EngineFactory, LLMEngine, create_backend, load_config

    assert create_backend(BackendConfig(kind="cpu")).kind == "cpu"
    assert isinstance(EngineFactory().create("cpu"), LLMEngine)
    assert isinstance(load_config(REPOSITORY / "examples" / "config_cpu.yaml"), DemoConfig)


async def test_the_engine_snippet_on_the_built_in_model() -> None:
    from sagellm_core import LLMEngine, LLMEngineConfig
    from sagellm_protocol import Request

    async with LLMEngine(LLMEngineConfig(model_path="builtin", backend_type="cpu", num_kv_blocks=256)) as engine:
        assert await engine.health_check()
        response = await engine.generate("What is LLM inference?", max_tokens=8)
        executed = await engine.execute(Request(model="builtin", prompt="What is LLM inference?", max_tokens=8))
        events = [event async for event in engine.stream("What is LLM inference?", max_tokens=8)]
        assert engine.get_info()["backend"] == "cpu"
    assert response.output_tokens == executed.output_tokens
    assert events[-1].event == "end"
    assert "".join(event.chunk for event in events if event.event == "delta") == response.output_text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_extras_and_commands() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "isagellm"
    extras = ["control-plane", "gateway", "server", "cuda", "ascend", "hf", "vllm", "ray", "modelscope", "all", "dev"]
    assert set(extras) <= set(project["optional-dependencies"])
    assert {"sage-llm", "sage-engine", "sage-gateway"} <= set(project["scripts"])


def test_the_command_line_has_the_documented_commands() -> None:
    import typer.main

    from sagellm.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {"run", "chat", "serve", "gateway", "info", "install", "pull", "list", "demo"} <= set(commands)
    options = {name: {flag for p in c.params for flag in p.opts} for name, c in commands.items()}
    assert {"-p", "--model", "--json"} <= options["run"]
    assert {"--model", "--engine-only", "--port"} <= options["serve"]
    assert "--port" in options["gateway"]
    assert "--github" in options["install"]
    assert {"--workload", "--output"} <= options["demo"]
