"""Decode speed of the engine beside `transformers.generate`, on the same checkpoint and dtype, in one run.

    python benchmarks/engine_vs_transformers.py --model FOLDER [--tokens 64] [--rounds 3]

Machines are noisy, so both sides take turns and the ratios are those of neighbouring runs. Prints one line a
figure and, with --json FILE, writes them all. Random weights do: the work does not depend on the words.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import SamplingParams

PROMPT_LENGTH = 128


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    results = asyncio.run(compare(arguments))
    for name, value in results.items():
        print(f"{name:34} {value:.2f}" if isinstance(value, float) else f"{name:34} {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


async def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turns; medians and ratios over the rounds."""
    peer = load_transformers(arguments.model)
    rows: dict[str, list[float]] = {"transformers": [], "engine": [], "concurrent": []}
    config = LLMEngineConfig(model_path=str(arguments.model), backend_type="cpu", enable_prefix_caching=False)
    async with LLMEngine(config) as engine:
        vocab_size = engine.model_config.spec.vocab_size
        await generate(engine, 1, 4, vocab_size, seed=99)
        peer_tokens_per_second(peer, 4, vocab_size)
        for seed in range(arguments.rounds):
            rows["transformers"].append(peer_tokens_per_second(peer, arguments.tokens, vocab_size))
            rows["engine"].append(await generate(engine, 1, arguments.tokens, vocab_size, seed))
            rows["concurrent"].append(await generate(engine, arguments.concurrency, arguments.tokens, vocab_size, seed))
        info = engine.get_info()
    return {
        "dtype": info["weight_dtype"],
        "kernel of linear": info["kernels"]["linear"],
        "transformers, tokens/s": statistics.median(rows["transformers"]),
        "engine, tokens/s": statistics.median(rows["engine"]),
        f"engine, {arguments.concurrency} requests, tokens/s": statistics.median(rows["concurrent"]),
        "engine / transformers": median_ratio(rows["engine"], rows["transformers"]),
        f"{arguments.concurrency} requests / one after another": median_ratio(rows["concurrent"], rows["engine"]),
    }


def load_transformers(folder: Path) -> Any:
    """The same checkpoint in `transformers`, in its own dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def make_prompt(vocab_size: int, seed: int) -> list[int]:
    """Random token ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (PROMPT_LENGTH,), generator=generator).tolist()


def peer_tokens_per_second(model: Any, num_tokens: int, vocab_size: int) -> float:
    """End to end, prompt included, as a user would time it."""
    ids = torch.tensor([make_prompt(vocab_size, 0)])
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    assert out.shape[1] == PROMPT_LENGTH + num_tokens
    return num_tokens / (time.perf_counter() - started)


async def generate(engine: LLMEngine, num_requests: int, num_tokens: int, vocab_size: int, seed: int) -> float:
    """Output tokens a second of `num_requests` at once, end to end."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    prompts = [make_prompt(vocab_size, seed * 100 + i) for i in range(num_requests)]
    started = time.perf_counter()
    responses = await asyncio.gather(*(engine.generate(prompt, sampling_params=sampling) for prompt in prompts))
    elapsed = time.perf_counter() - started
    assert all(len(response.output_tokens) == num_tokens for response in responses)
    return num_requests * num_tokens / elapsed


def median_ratio(first: list[float], second: list[float]) -> float:
    """The median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
