"""`/docs`: the API's own document, with everything it needs from this server."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest

from asgi_client import client_of
from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    manager = ControlPlaneManager()
    manager.register_engine(FakeEngine(max_model_len=64), engine_id="fake", model="m")
    async with client_of(create_app(manager, default_model="m")) as client:
        yield client


async def test_the_document_and_its_files_come_from_here(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self';" in page.headers["content-security-policy"]
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(linked) == 4
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path in linked:
        answer = await client.get(f"/{path}", headers={"accept-encoding": "gzip"})
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].split(";")[0] == kinds[path.rpartition(".")[2]]
        assert answer.content
    start = (await client.get("/docs/start.js")).text
    assert "SwaggerUIBundle(" in start
    (document,) = re.findall(r'url: "([^"]+)"', start)
    assert (await client.get(f"/{document}")).json()["paths"]["/v1/chat/completions"]


@pytest.mark.parametrize("path", ["/docs/other.js", "/docs/redoc.standalone.js", "/docs/..%2fcore.py", "/redoc"])
async def test_nothing_else_is_there(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404
