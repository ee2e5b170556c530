"""The web page: `/` for browsers, and its files under `/page/`.

Promises: only the files of a fixed table are served, read once from the package; addresses hold a digest of all of
them, so that browsers keep them for good and never mix two versions; the page may load and call this server alone
(Content Security Policy, level 3), and no text can become script or markup in it (Trusted Types).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

from sagellm_gateway.context import gateway_of
from sagellm_gateway.documents import PAGE, described
from sagellm_gateway.routes.info import welcome
from sagellm_gateway.static_files import StaticFile
from sagellm_protocol import NotFoundError

router = APIRouter(tags=["sageLLM"])

FILES = (
    "css/base.css",
    "css/chat.css",
    "css/dashboard.css",
    "css/frame.css",
    "css/prose.css",
    "css/settings.css",
    "icon.svg",
    "js/api.js",
    "js/app.js",
    "js/chart.js",
    "js/chat_files.js",
    "js/chats.js",
    "js/conversation.js",
    "js/dashboard.js",
    "js/dom.js",
    "js/format.js",
    "js/generation.js",
    "js/highlight.js",
    "js/local_sessions.js",
    "js/markdown.js",
    "js/message.js",
    "js/server_sessions.js",
    "js/settings.js",
    "js/sidebar.js",
    "js/theme.js",
    "vendor/marked.LICENSE.md",
    "vendor/marked.esm.js",
)

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_FOR_DOCUMENTS = {"Content-Security-Policy": _POLICY, "Cross-Origin-Opener-Policy": "same-origin"}
_FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class _Page:
    """The page as it is sent: its files by their names, its document by where chats are kept."""

    digest: str
    files: dict[str, StaticFile]
    documents: dict[str, StaticFile]


@router.get("/", response_model=None)
@described(also=PAGE, fails=(304,))
async def home(http: HttpRequest) -> HttpResponse:
    """The web page for browsers; for programs, how to call this server."""
    if "text/html" in http.headers.get("accept", ""):
        # Chats that the server would forget when it ends are better kept in the browser.
        keeper = "browser" if gateway_of(http).settings.sessions.store == "memory" else "server"
        answer = _page().documents[keeper].answer(http, cache_control="no-cache", headers=_FOR_DOCUMENTS)
    else:
        answer = await welcome(http)
    answer.headers["Vary"] = "Accept, Accept-Encoding"
    return answer


@router.get("/page/{path:path}", response_model=None, include_in_schema=False)
async def page_file(http: HttpRequest, path: str) -> HttpResponse:
    """A file of the page; the path is a name of the table, or one of it behind the digest."""
    digest, _, name = path.partition("/")
    is_lasting = digest == _page().digest
    name = name if is_lasting else path
    if name not in FILES:
        raise NotFoundError(f"the page has no file {path!r}; load / again")
    return _page().files[name].answer(http, cache_control=_FOREVER if is_lasting else "no-cache")


@cache
def _page() -> _Page:
    folder = files("sagellm_gateway.page")
    contents = {name: folder.joinpath(name).read_bytes() for name in FILES}
    document = folder.joinpath("index.html").read_bytes()
    whole = hashlib.sha256(document)
    for name, content in contents.items():
        whole.update(f"{name} {len(content)} ".encode() + content)
    digest = whole.hexdigest()[:16]
    document = document.replace(b"{{page}}", f"page/{digest}".encode())
    keepers = {keeper: document.replace(b"{{sessions}}", keeper.encode()) for keeper in ("browser", "server")}
    return _Page(
        digest,
        {name: StaticFile(name, content) for name, content in contents.items()},
        {keeper: StaticFile("index.html", content) for keeper, content in keepers.items()},
    )
