"""The control plane on virtual time: its own queue, policies and routers over simulated engines (docs/simulator.md)."""

from __future__ import annotations

from sagellm_benchmark.simulator.engine import EngineSpec
from sagellm_benchmark.simulator.report import (
    GOODPUT_TPOT_S,
    GOODPUT_TTFT_S,
    SimulationReport,
    as_json,
    summarize,
)
from sagellm_benchmark.simulator.simulation import Outcome, SimulationConfig, SimulationResult, simulate
from sagellm_benchmark.simulator.synthetic import SyntheticLoad

__all__ = [
    "GOODPUT_TPOT_S",
    "GOODPUT_TTFT_S",
    "EngineSpec",
    "Outcome",
    "SimulationConfig",
    "SimulationReport",
    "SimulationResult",
    "SyntheticLoad",
    "as_json",
    "simulate",
    "summarize",
]
