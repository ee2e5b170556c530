"""A plan in words and in plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sagellm_control_plane.planner.search import Estimate, Plan

_PARTS = {
    "linear": "reading and multiplying weights",
    "attention": "reading the KV cache",
    "small": "norms, activations and launches",
    "collectives": "collectives between devices",
    "host": "scheduling and sampling",
}


def explain(plan: Plan) -> list[str]:
    """Why this layout: one sentence each."""
    best = plan.best
    lines = [_verdict(plan)]
    step = best.step
    lines.append(
        f"A step of decoding takes {1e3 * step.total:.1f} ms, {getattr(step, step.largest) / step.total:.0%} of it for "
        f"{_PARTS[step.largest]}; with the prefills between, a token comes every {best.tpot_ms:.1f} ms."
    )
    lines.append(
        f"{best.weights_gib:.1f} of {plan.cluster.device.memory_gib:g} GiB a device hold weights; the KV cache of a "
        f"replica has {best.num_kv_tokens:,} tokens, {best.batch_size} sequences decode there at a time."
    )
    unused = plan.cluster.num_devices - best.layout.num_devices
    if unused:
        lines.append(f"{unused} of {plan.cluster.num_devices} devices stay unused.")
    runner_up = next((item for item in plan.estimates[1:] if item.is_good), None)
    if runner_up is not None:
        lines.append(
            f"The next best is {runner_up.layout}: {runner_up.tokens_per_s:,.0f} tokens/s, "
            f"a token every {runner_up.tpot_ms:.1f} ms."
        )
    if plan.rejected:
        layout, reason = next(iter(plan.rejected.items()))
        others = len(plan.rejected) - 1
        lines.append(f"{layout} does not fit: {reason}" + (f"; nor do {others} others." if others else "."))
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan; times in the units that names say."""
    pareto = {id(item) for item in plan.pareto}
    return {
        "model": {
            "name": plan.model.name,
            "num_params": plan.model.num_params,
            "active_params": plan.model.active_params,
            "weight_dtype": plan.model.weight_dtype,
            "kv_bytes_per_token": plan.model.kv_bytes_per_token,
        },
        "cluster": {"device": plan.cluster.device.name, "num_devices": plan.cluster.num_devices},
        "objectives": asdict(plan.objectives),
        "best": _estimate(plan.best, is_pareto=id(plan.best) in pareto),
        "estimates": [_estimate(item, is_pareto=id(item) in pareto) for item in plan.estimates],
        "rejected": plan.rejected,
        "explanation": explain(plan),
    }


def _verdict(plan: Plan) -> str:
    best, goal = plan.best, plan.objectives
    reach = (
        f"{best.layout} reaches {best.tokens_per_s:,.0f} tokens/s ({best.requests_per_s:.2f} requests/s), first tokens "
        f"within {best.ttft_ms:.0f} ms and one every {best.tpot_ms:.1f} ms"
    )
    if best.is_good:
        return f"{reach}: the most of {len(plan.estimates)} layouts that fit."
    missed = []
    if goal.ttft_ms is not None and best.ttft_ms > goal.ttft_ms:
        missed.append(f"first tokens within {goal.ttft_ms:g} ms")
    if goal.tpot_ms is not None and best.tpot_ms > goal.tpot_ms:
        missed.append(f"a token every {goal.tpot_ms:g} ms")
    return f"No layout keeps {' and '.join(missed)}, even for one request at a time. The nearest: {reach}."


def _estimate(item: Estimate, *, is_pareto: bool) -> dict[str, Any]:
    values = asdict(item)
    values["layout"] = {**asdict(item.layout), "num_devices": item.layout.num_devices, "text": str(item.layout)}
    values["step_s"] = values.pop("step")
    return {**values, "is_pareto": is_pareto}
