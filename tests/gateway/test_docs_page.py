"""`/docs`: the API's own document, with everything it needs from this server."""

from __future__ import annotations

import re

import httpx
import pytest


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
