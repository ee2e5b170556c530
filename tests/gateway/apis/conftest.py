"""A gateway whose chat service answers what it was told, for the tests of the APIs that render it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from asgi_client import client_of
from fake_chat import FakeChat, text_answer
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app
from sagellm_gateway.app import Gateway


@pytest.fixture
def chat() -> FakeChat:
    return FakeChat(text_answer("Hello", " there"))


@pytest.fixture
def app(chat: FakeChat) -> Gateway:
    manager = ControlPlaneManager()
    manager.register_engine(FakeEngine(max_model_len=64), engine_id="fake", model="m")
    app = create_app(manager, default_model="m")
    app.chat = chat  # type: ignore[assignment]
    return app


@pytest.fixture
async def client(app: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client
