"""Fixtures of the model tests."""

from __future__ import annotations

import pytest

from sagellm_backend import BackendProvider, get_provider


@pytest.fixture(scope="session")
def provider() -> BackendProvider:
    return get_provider("cpu")
