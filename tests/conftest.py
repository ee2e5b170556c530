"""Fixtures that every part's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no fault of the code: no test may fail by the clock. What fails says how it is repeated.
settings.register_profile("no-deadline", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-deadline")

# Before torch is imported anywhere: the models of the tests are too small for threads, whose waiting for each other
# would take most of the time on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained models, golden outputs and texts; the test is skipped where it is absent."""
    folder = Path(os.environ.get("SAGELLM_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the shared test data: {folder} is no folder; set SAGELLM_SHARED to where it is")
    return folder
