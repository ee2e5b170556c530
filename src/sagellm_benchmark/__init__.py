"""Measurement of sageLLM: workloads of `sage-llm demo`, and latency, throughput and kernels of `sage-llm bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_benchmark.kernels import KernelReport, measure_kernels, plan_kernels
    from sagellm_benchmark.serving import Load, describe_latency, describe_throughput, run_load
    from sagellm_benchmark.workloads import WORKLOADS, ScenarioSpec, Workload, build_scenario, load_workload
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            ".kernels": ("KernelReport", "measure_kernels", "plan_kernels"),
            ".serving": ("Load", "describe_latency", "describe_throughput", "run_load"),
            ".workloads": ("WORKLOADS", "ScenarioSpec", "Workload", "build_scenario", "load_workload"),
        },
    )

__all__ = [
    "WORKLOADS",
    "KernelReport",
    "Load",
    "ScenarioSpec",
    "Workload",
    "build_scenario",
    "describe_latency",
    "describe_throughput",
    "load_workload",
    "measure_kernels",
    "plan_kernels",
    "run_load",
]
