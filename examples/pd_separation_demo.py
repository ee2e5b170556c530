"""Prefill and decode on engines of their own: `python examples/pd_separation_demo.py`.

A long prompt is computed by the prefill engine, whose KV blocks go to the decode engine, which makes the answer; a
short one is answered by the decode engine as a whole. Every answer is compared with that of one engine alone.
"""

from __future__ import annotations

import asyncio

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_core.runtime import PDRuntime
from sagellm_protocol import Request, SamplingParams

THRESHOLD = 100  # prompt tokens from which a prompt is handed over
SHORT = "Once upon a time"
LONG = "The little engine carried its wagons up the hill and down again. " * 12


def make_engine(name: str) -> LLMEngine:
    """An engine with the built-in model."""
    config = {"model_path": "builtin", "backend_type": "cpu", "engine_id": name, "max_model_len": 512}
    return LLMEngine(LLMEngineConfig.model_validate(config | {"num_kv_blocks": 256}))


def make_request(prompt: str, seed: int) -> Request:
    """A sampled answer of 24 tokens."""
    sampling = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.8, seed=seed)
    return Request(prompt=prompt, sampling_params=sampling)


async def main() -> None:
    """Send short and long prompts at once, show where each went, and check the tokens."""
    requests = [make_request(f"{seed}. {prompt}", seed) for seed, prompt in enumerate((SHORT, LONG) * 3)]
    runtime = PDRuntime(
        prefill=[make_engine("prefill-1")], decode=[make_engine("decode-1")], min_handed_over_tokens=THRESHOLD
    )
    async with runtime, make_engine("alone") as alone:
        responses = await asyncio.gather(*(runtime.execute(request) for request in requests))
        for request, response in zip(requests, responses, strict=True):
            metrics, num_tokens = response.metrics, response.usage.prompt_tokens
            way = "decode-1"
            if metrics.kv_transfer_count:
                size = metrics.kv_transfer_bytes >> 10
                way = f"prefill-1 -> decode-1 ({size} KiB in {metrics.kv_transfer_ms:.1f} ms)"
            expected = (await alone.execute(request)).output_tokens
            verdict = "the same tokens" if response.output_tokens == expected else "OTHER TOKENS"
            print(f"{num_tokens:4d} prompt tokens: {way}, first token after {metrics.ttft_ms:.1f} ms; {verdict}")


if __name__ == "__main__":
    asyncio.run(main())
