"""The two documented ways of use, as they stand in the documents, with the built-in model."""

from __future__ import annotations

from types import SimpleNamespace

from sagellm import BackendConfig, ControlPlaneManager, EngineConfig
from sagellm_control_plane import ExecutionInstance, ExecutionInstanceType, ParallelismConfig, PDSeparationConfig


async def test_engines_by_configuration() -> None:
    manager = ControlPlaneManager(
        backend_config=BackendConfig(kind="cpu", device="cpu"),
        engine_configs=[EngineConfig(kind="cpu", model="builtin", model_path="builtin")],
    )
    await manager.start()
    response = await manager.execute_request(prompt="Hello", max_tokens=8)
    await manager.stop()
    assert response.error is None
    assert 1 <= len(response.output_tokens) <= 8
    assert response.metrics.ttft_ms > 0


async def test_engines_by_instance() -> None:
    manager = ControlPlaneManager(
        scheduling_policy="adaptive",
        enable_pd_separation=True,
        pd_config=PDSeparationConfig(enabled=True, routing_policy="adaptive", prefilling_threshold_input_tokens=800),
        parallelism_config=ParallelismConfig(
            auto_optimize=True, supported_strategies=["TP", "PP", "DP", "EP", "Hybrid"]
        ),
    )
    manager.register_instance(
        ExecutionInstance(
            instance_id="prefill-1",
            model_name="builtin",
            instance_type=ExecutionInstanceType.PREFILLING,
            tensor_parallel_size=4,
            gpu_count=4,
        )
    )
    sampling_params = SimpleNamespace(temperature=0.0, max_tokens=6, n=1, stop=[], top_p=1.0)
    output = await manager.process_request(prompt="Once upon a time", sampling_params=sampling_params)
    assert len(output.output_tokens) == 6
    m = manager.get_metrics()
    assert m.throughput > 0
    assert m.avg_latency > 0
    assert 0 <= m.gpu_utilization <= 1
    assert 0 <= m.cache_hit_rate <= 1
    await manager.stop()
