"""A gateway over an engine without a model, and its client; a file that needs another has its own `engine` or `app`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from asgi_client import client_of
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_model_len=64)


@pytest.fixture
def app(engine: FakeEngine) -> Gateway:
    manager = ControlPlaneManager()
    manager.register_engine(engine, engine_id="fake", model="m")
    return create_app(manager, default_model="m")


@pytest.fixture
async def client(app: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client
