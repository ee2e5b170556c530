"""Prompts routed by their length to two engines: `python examples/pd_separation_demo.py`.

Long prompts keep an engine busy with prefill, and short ones wait behind them. With PD routing long prompts go to an
instance of type PREFILLING and short ones to one of type DECODING, each with a scheduler and a KV cache of its own.

What this is not: a request runs from its first to its last token on the engine that it was given to. No KV cache is
handed over from one engine to the other.
"""

from __future__ import annotations

import asyncio

from sagellm_control_plane import (
    ControlPlaneManager,
    ExecutionInstance,
    ExecutionInstanceType,
    PDSeparationConfig,
)
from sagellm_protocol import Response, SamplingParams

THRESHOLD = 100  # prompt tokens, estimated from the length of the text
SHORT = "Once upon a time"
LONG = "The little engine carried its wagons up the hill and down again. " * 12


def make_manager() -> ControlPlaneManager:
    """A control plane with one engine for long prompts and one for short ones, both with the built-in model."""
    manager = ControlPlaneManager(
        scheduling_policy="adaptive",
        enable_pd_separation=True,
        pd_config=PDSeparationConfig(
            enabled=True, routing_policy="adaptive", prefilling_threshold_input_tokens=THRESHOLD
        ),
    )
    for name, kind in (("long-1", ExecutionInstanceType.PREFILLING), ("short-1", ExecutionInstanceType.DECODING)):
        manager.register_instance(
            ExecutionInstance(instance_id=name, model_name="builtin", instance_type=kind, max_concurrent_requests=8)
        )
    return manager


async def main() -> list[Response]:
    """Send short and long prompts at once and show where each went."""
    async with make_manager() as manager:
        sampling = SamplingParams(max_tokens=24, ignore_eos=True)
        responses = await asyncio.gather(
            *(manager.process_request(prompt=prompt, sampling_params=sampling) for prompt in (SHORT, LONG) * 3)
        )
        for response in responses:
            print(
                f"{response.usage.prompt_tokens:4d} prompt tokens -> {response.engine_id}: "
                f"first token after {response.metrics.ttft_ms:6.1f} ms, then {response.metrics.tpot_ms:5.1f} ms a token"
            )
        figures = manager.get_metrics()
        print(f"{figures.num_requests} requests, {figures.avg_latency:.2f} s on average")
        return list(responses)


if __name__ == "__main__":
    asyncio.run(main())
