"""Measured step times of published simulators, beside what the planner expects: `python measured_latencies.py`.

- `distserve`: latencies of OPT models on A100-80GB, by two engines (DistServe's own, vLLM of 2023), as the polynomials
  that its authors fitted, and how many tokens the KV cache took in every layout.
- `splitwise`: latencies of Llama 2 70B and BLOOM 176B on A100 and H100 machines (engines of 2023).
"""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import log1p
from pathlib import Path
from statistics import median

from sagellm_control_plane.planner import Engine, Layout, ModelCosts, Roofline, load_devices, read_model_costs

SHARED = Path(os.environ.get("SAGELLM_SHARED") or Path(__file__).parents[3] / "shared") / "traces"

DEVICES = load_devices()
_CONTEXT = 512  # tokens of each sequence, where DistServe's decoding is looked at


def _opt(hidden_size: int, num_layers: int, num_heads: int) -> ModelCosts:
    config = {
        "model_type": "opt",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "ffn_dim": 4 * hidden_size,
        "vocab_size": 50272,
        "torch_dtype": "float16",
    }
    return read_model_costs(config)


MODELS = {
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "facebook/opt-175b": _opt(12288, 96, 96),
    "llama2-70b": read_model_costs(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
            "vocab_size": 32000,
            "torch_dtype": "float16",
        }
    ),
    "bloom-176b": read_model_costs(
        {
            "model_type": "bloom",
            "n_embed": 14336,
            "n_layer": 70,
            "n_head": 112,
            "vocab_size": 250880,
            "torch_dtype": "float16",
        }
    ),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One measured latency; `phase` is prefill or decode, of `batch_size` sequences of `num_tokens` each."""

    model: str
    device: str
    tp: int
    phase: str
    num_tokens: float
    batch_size: int
    milliseconds: float

    @property
    def group(self) -> tuple[str, int]:
        """What is held out together."""
        return self.model, self.tp

    def expected(self, engine: Engine) -> float:
        """Milliseconds by the planner."""
        roofline = Roofline(MODELS[self.model], DEVICES[self.device], Layout(tp=self.tp), engine)
        if self.phase == "prefill":
            return 1e3 * roofline.prefill(int(self.num_tokens), batch_size=self.batch_size).total
        return 1e3 * roofline.decode(self.batch_size, self.num_tokens).total

    def error(self, engine: Engine) -> float:
        """Relative; negative where less was expected than measured."""
        return self.expected(engine) / self.milliseconds - 1


def distserve(engine: str) -> list[Point]:
    """Points on the fitted polynomials of `engine`, distserve or vllm."""
    points = []
    profiles = json.loads((SHARED / "distserve" / f"profiler-a100-80g.{engine}.json").read_text())
    for model, by_tp in profiles.items():
        for tp, fit in by_tp.items():
            if 2 * MODELS[model].num_params / int(tp) > 80e9:
                continue  # cannot have been measured
            a, b, c = fit["prefill"]
            for n in (256, 512, 1024, 1536, 2048):
                points.append(Point(model, "A100", int(tp), "prefill", n, 1, a + b * n + c * n * n))
            for size in (1, 8, 32, 64, 128):
                is_small = size < fit["decoding_large_small_bs_threshold"]
                a, b, c = fit["decoding_smallbs" if is_small else "decoding_largebs"]
                measured = a + b * size * _CONTEXT + c * size
                points.append(Point(model, "A100", int(tp), "decode", _CONTEXT, size, measured))
    return points


def splitwise(device: str) -> list[Point]:
    """The median of the repetitions of each case; `device` is A100 or H100."""
    cases = defaultdict(list)
    with (SHARED / "splitwise_sim" / "perf_model.csv").open() as file:
        for row in csv.DictReader(file):
            if row["hardware"] == f"{device.lower()}-80gb":
                names = ("tensor_parallel", "prompt_size", "batch_size", "token_size")
                cases[(row["model"], *(int(row[name]) for name in names))].append(row)
    points = []
    for (model, tp, num_prompt, size, num_output), rows in cases.items():
        prompt = median(float(row["prompt_time"]) for row in rows)
        token = median(float(row["token_time"]) for row in rows)
        points.append(Point(str(model), device, tp, "prefill", num_prompt, size, prompt))
        points.append(Point(str(model), device, tp, "decode", num_prompt + num_output / 2, size, token))
    return points


def cache_sizes() -> list[tuple[Layout, float]]:
    """Relative error of the tokens that fit into the KV cache, by layout."""
    errors = []
    with (SHARED / "distserve" / "max_num_tokens.csv").open() as file:
        for row in csv.DictReader(file):
            layout = Layout(tp=int(row["tp"]), pp=int(row["pp"]))
            roofline = Roofline(MODELS[row["model"]], DEVICES["A100"], layout)
            expected = roofline.num_kv_tokens(max_num_batched_tokens=2048)
            errors.append((layout, expected / int(row["max_num_tokens"]) - 1))
    return errors


def fit(points: Sequence[Point]) -> Engine:
    """The two constants of an engine that give the least mean error, of the logarithm."""
    candidates = (
        Engine(slowdown, layer_us) for slowdown, layer_us in product((1.0, 1.15, 1.3, 1.5, 1.7), range(0, 800, 100))
    )
    return min(candidates, key=lambda engine: sum(abs(log1p(point.error(engine))) for point in points))


def held_out_errors(points: Sequence[Point]) -> list[float]:
    """Each model and number of devices is expected with the constants that the others gave."""
    errors = []
    for group in sorted({point.group for point in points}):
        engine = fit([point for point in points if point.group != group])
        errors += [point.error(engine) for point in points if point.group == group]
    return errors


SOURCES = {
    "DistServe": lambda: distserve("distserve"),
    "vLLM 2023": lambda: distserve("vllm"),
    "Splitwise A100": lambda: splitwise("A100"),
    "Splitwise H100": lambda: splitwise("H100"),
}


def main() -> None:
    """Print the errors: as it stands, and with the engine's constants from the other cases."""
    print("| measured by | points | phase | bias | median error | p90 | held out: median | p90 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, read in SOURCES.items():
        points = read()
        for phase in ("prefill", "decode"):
            some = [point for point in points if point.phase == phase]
            plain, held_out = [point.error(Engine()) for point in some], held_out_errors(some)
            cells = [f"{median(plain):+.0%}", *_spread(plain), *_spread(held_out)]
            print(f"| {name} | {len(some)} | {phase} | {' | '.join(cells)} |")
        print(f"<!-- {name}: {fit(points)} -->")
    errors = [error for _, error in cache_sizes()]
    print(f"KV cache: {len(errors)} layouts, bias {median(errors):+.0%}, median error {_spread(errors)[0]}")


def _spread(errors: Sequence[float]) -> list[str]:
    sizes = sorted(abs(error) for error in errors)
    return [f"{median(sizes):.0%}", f"{sizes[int(0.9 * (len(sizes) - 1))]:.0%}"]


if __name__ == "__main__":
    main()
