"""Long contexts: whole steps of a model beside what this machine's memory and arithmetic allow, in one run.

    python benchmarks/long_context.py --model qwen2-0.5b [--quantization int4] [--json FILE]

A decode step reads the weights once and the KV of its context once: the share is bytes over time and read bandwidth.
What the context alone costs is the step's time less that of a short one, beside the KV bytes alone. A prefill is
counted in multiply-adds: those of the weights at the rate of their format, those of attention at bf16's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sagellm_backend import AttentionMetadata, KVLayout, StepWants, get_provider
from sagellm_benchmark.machine import Arithmetic, Limits, measure_limits
from sagellm_core.models import load_model
from sagellm_core.models.decoder import CausalLM

BLOCK_SIZE = 16
SHORT = 64
CONTEXTS = (1024, 4096, 16384)
PROMPT = 8192
CHUNK = 1024
KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv-cache-dtype", default="bf16", choices=list(KV_DTYPES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    provider = get_provider("cpu")
    model = load_model(
        arguments.model, provider=provider, max_model_len=max(CONTEXTS), quantization=arguments.quantization
    )
    layout = KVLayout(
        model.spec.num_layers,
        model.spec.num_kv_heads,
        model.spec.head_dim,
        BLOCK_SIZE,
        KV_DTYPES[arguments.kv_cache_dtype],
    )
    kind: Arithmetic = "bfloat16" if arguments.quantization == "none" else "int8"
    with torch.inference_mode():
        step = make_step(provider, model, layout)
        results = measure(step, model, layout, measure_limits(provider.ops), kind, arguments.runs)
    table = Table("work", "ms", "tok/s", "share of the limit", "what bounds it")
    for result in results:
        share = "" if result["share"] is None else f"{result['share']:.2f}"
        table.add_row(
            result["work"], f"{result['ms']:.2f}", f"{result['tokens_per_second']:.1f}", share, result["limit"]
        )
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


Step = Callable[[int, int], float]


def make_step(provider: Any, model: CausalLM, layout: KVLayout) -> Step:
    """A function (new tokens, context with them) -> seconds of one step of a request."""
    num_blocks = max(CONTEXTS) // BLOCK_SIZE
    caches = provider.allocate_kv_cache(layout, num_blocks)
    program = provider.compile_step(
        lambda ids, meta: model.forward(ids, meta.positions, caches, meta), model.compute_logits, model.spec.hidden_size
    )
    wants = StepWants(only_best=True)

    def step(num_tokens: int, context: int) -> float:
        meta = AttentionMetadata.build(
            query_lens=[num_tokens],
            context_lens=[context],
            block_tables=[list(range(-(-context // BLOCK_SIZE)))],
            block_size=BLOCK_SIZE,
        )
        ids = torch.randint(0, model.spec.vocab_size, (num_tokens,))
        started_at = time.perf_counter()
        program(ids, meta, torch.tensor([num_tokens - 1]), wants)
        return time.perf_counter() - started_at

    return step


def measure(
    step: Step, model: CausalLM, layout: KVLayout, limits: Limits, kind: Arithmetic, runs: int
) -> list[dict[str, Any]]:
    """Decode steps by context, then a prefill in chunks."""
    step(1, SHORT)
    short = statistics.median(step(1, SHORT) for _ in range(3 * runs))
    results = [row("decode, short context", short, 1, model.weight_bytes / limits.read_bytes_per_second, "weights")]
    for context in CONTEXTS:
        step(1, context)
        seconds = statistics.median(step(1, context) for _ in range(runs))
        kv_bytes = context * layout.bytes_per_token
        whole = (model.weight_bytes + kv_bytes) / limits.read_bytes_per_second
        results.append(row(f"decode, {context:,} tokens of context", seconds, 1, whole, "weights and KV"))
        alone = kv_bytes / limits.read_bytes_per_second
        results.append(
            row("  of this the context", max(seconds - short, 1e-9), 1, alone, f"{kv_bytes / 1e6:.0f} MB of KV")
        )
    seconds = statistics.median(prefill(step) for _ in range(max(1, runs // 2)))
    results.append(
        row(f"prefill of {PROMPT:,} tokens", seconds, PROMPT, arithmetic_seconds(model, limits, kind), "multiply-adds")
    )
    return results


def prefill(step: Step) -> float:
    """Seconds of a prompt in chunks."""
    return sum(step(CHUNK, end) for end in range(CHUNK, PROMPT + 1, CHUNK))


def arithmetic_seconds(model: CausalLM, limits: Limits, kind: Arithmetic) -> float:
    """The prefill's multiply-adds at the machine's rates."""
    spec = model.spec
    head_size = spec.vocab_size * spec.hidden_size
    num_weights = spec.num_parameters - head_size * (1 if spec.tie_word_embeddings else 2)
    weights = 2 * num_weights * PROMPT / limits.flops_per_second[kind]
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * PROMPT**2 / limits.flops_per_second["bfloat16"]
    return weights + attention


def row(work: str, seconds: float, num_tokens: int, limit_s: float, limit: str) -> dict[str, Any]:
    """One line of the table."""
    rate = num_tokens / seconds
    return {"work": work, "ms": seconds * 1e3, "tokens_per_second": rate, "share": limit_s / seconds, "limit": limit}


if __name__ == "__main__":
    main()
