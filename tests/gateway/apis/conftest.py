"""A gateway whose chat service answers what it was told, for the tests of the APIs that render it."""

from __future__ import annotations

import pytest

from fake_chat import FakeChat, text_answer
from sagellm_gateway.app import Gateway


@pytest.fixture
def chat() -> FakeChat:
    return FakeChat(text_answer("Hello", " there"))


@pytest.fixture
def app(app: Gateway, chat: FakeChat) -> Gateway:
    app.chat = chat  # type: ignore[assignment]
    return app
