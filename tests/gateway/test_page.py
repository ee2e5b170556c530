"""The web page's files: what is served, how, and that they hold together."""

from __future__ import annotations

import re
from importlib.resources import files

import httpx
import pytest

from sagellm_gateway.routes.page import FILES

PAGE = files("sagellm_gateway.page")
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8", "accept-encoding": "identity"}


async def root_of(client: httpx.AsyncClient) -> str:
    """The folder that the document loads its files from."""
    document = (await client.get("/", headers=BROWSER)).text
    folders = set(re.findall(r'(?:src|href)="(page/[^/"]+)/', document))
    assert len(folders) == 1
    return f"/{folders.pop()}"


async def test_browsers_get_the_page_and_programs_a_welcome(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "{{" not in page.text
    assert page.headers["cache-control"] == "no-cache"
    for accept in ("*/*", "application/json"):
        welcome = await client.get("/", headers={"accept": accept})
        assert welcome.json()["openai_base_url"] == str(client.base_url.join("/v1"))
        assert "Accept" in welcome.headers["vary"]
    assert "Accept" in page.headers["vary"]


async def test_the_page_may_talk_to_its_server_alone_and_run_no_text_as_script(client: httpx.AsyncClient) -> None:
    page = await client.get("/", headers=BROWSER)
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy.pop("trusted-types") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\bsrc=)", page.text)
    assert not re.search(r"\sstyle=|\son\w+=|<style", page.text)


@pytest.mark.parametrize("name", FILES)
async def test_files_are_kept_for_good_under_their_digest(client: httpx.AsyncClient, name: str) -> None:
    root = await root_of(client)
    answer = await client.get(f"{root}/{name}", headers={"accept-encoding": "identity"})
    assert answer.status_code == 200
    assert answer.content == PAGE.joinpath(name).read_bytes()
    kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "md": "text/markdown"}
    assert answer.headers["content-type"].split(";")[0] == kind[name.rpartition(".")[2]]
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    plain = await client.get(f"/page/{name}")
    assert plain.content == answer.content
    assert plain.headers["cache-control"] == "no-cache"


async def test_a_body_that_the_browser_has_is_not_sent_again(client: httpx.AsyncClient) -> None:
    for path in ("/", f"{await root_of(client)}/js/app.js"):
        first = await client.get(path, headers=BROWSER)
        again = await client.get(path, headers={**BROWSER, "if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        other = await client.get(path, headers={**BROWSER, "if-none-match": '"other"'})
        assert other.content == first.content
        packed = await client.get(path, headers={**BROWSER, "accept-encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.content == first.content  # the client unpacks
        assert packed.headers["etag"] != first.headers["etag"]
        assert int(packed.headers["content-length"]) < len(first.content) * 0.6


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/index.html",
        "/page/__init__.py",
        "/page/js/none.js",
        "/page/0123456789abcdef/js/app.js",
        "/page/../routes/page.py",
        "/page/%2e%2e/routes/page.py",
        "/page/js/..%2f..%2fapp.py",
        "/page//etc/passwd",
        "/page/js/app.js%00",
        "/page/js\\app.js",
    ],
)
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_the_table_names_every_file_of_the_folder() -> None:
    found = set()
    for folder in ("", "css", "js", "vendor"):
        entries = (PAGE.joinpath(folder) if folder else PAGE).iterdir()
        found |= {f"{folder}/{entry.name}".lstrip("/") for entry in entries if entry.is_file()}
    assert found - {"index.html", "__init__.py"} == set(FILES)


def test_every_module_is_loaded_with_the_page_and_nothing_from_elsewhere() -> None:
    document = PAGE.joinpath("index.html").read_text(encoding="utf-8")
    linked = set(re.findall(r'(?:src|href)="\{\{page\}\}/([^"]+)"', document))
    assert linked == {name for name in FILES if not name.endswith(".md")}
    for name in (name for name in FILES if name.startswith(("js/", "css/"))):
        text = PAGE.joinpath(name).read_text(encoding="utf-8")
        imported = re.findall(r'from "\./([^"]+)"', text)
        assert {f"js/{module}" for module in imported} <= set(FILES)
        addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, "the page must work offline"
        assert not re.search(r"\b(?:inner|outer)HTML\b|insertAdjacentHTML|document\.write|\beval\(", text)
