"""Measurement of sageLLM. So far: the workloads of `sage-llm demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagellm_protocol.lazy import lazy_exports

if TYPE_CHECKING:
    from sagellm_benchmark.workloads import WORKLOADS, ScenarioSpec, Workload, build_scenario, load_workload
else:
    __getattr__, __dir__ = lazy_exports(
        __name__, {".workloads": ("WORKLOADS", "ScenarioSpec", "Workload", "build_scenario", "load_workload")}
    )

__all__ = ["WORKLOADS", "ScenarioSpec", "Workload", "build_scenario", "load_workload"]
