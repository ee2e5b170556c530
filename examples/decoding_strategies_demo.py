"""Six ways to choose tokens, on the built-in model: `python examples/decoding_strategies_demo.py [--model MODEL]`."""

from __future__ import annotations

import argparse
import asyncio

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import DecodingStrategy, SamplingParams, SamplingPreset

SCENARIOS = {
    "greedy: always the most probable token": SamplingParams(max_tokens=40),
    "sampling with a seed: varied, but the same at every run": SamplingParams(temperature=0.8, seed=7, max_tokens=40),
    "the preset `creative`: temperature 1 within the most probable 95%, repeats avoided": SamplingParams.from_preset(
        SamplingPreset.CREATIVE, top_k=50, seed=7, max_tokens=40
    ),
    "beam search: the most probable text of four that are followed": SamplingParams(num_beams=4, max_tokens=40),
    "contrastive search: probable, yet unlike what was said": SamplingParams(
        strategy=DecodingStrategy.CONTRASTIVE, top_k=4, penalty_alpha=0.6, max_tokens=40
    ),
    "repetition penalty, and a stop string that ends the text with its first sentence": SamplingParams(
        repetition_penalty=1.2, stop=(".",), include_stop_str_in_output=True, max_tokens=40
    ),
}


async def main(model: str, prompt: str) -> None:
    """Continue `prompt` in each of the six ways."""
    async with LLMEngine(LLMEngineConfig(model_path=model)) as engine:
        for number, (title, sampling) in enumerate(SCENARIOS.items(), start=1):
            response = await engine.generate(prompt, sampling_params=sampling)
            print(f"{number}. {title}\n   {prompt}{response.output_text}")
            print(f"   [{sampling.strategy}, {len(response.output_tokens)} tokens, {response.finish_reason}]\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Six decoding strategies on one prompt.")
    parser.add_argument("--model", default="builtin", help="a folder, a .gguf file, a hub id or `builtin`")
    parser.add_argument("--prompt", default="Once upon a time, there was a little")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.model, arguments.prompt))
