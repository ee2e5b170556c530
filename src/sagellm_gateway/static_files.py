"""Files that are served as they are: read once, sent plain or compressed, never twice to a browser that has them."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping

from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "svg": "image/svg+xml",
}
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class StaticFile:
    """The content of a file; `name` ends as its kind says."""

    def __init__(self, name: str, content: bytes) -> None:
        compressed = gzip.compress(content, mtime=0)
        self._type = _TYPES[name.rpartition(".")[2]]
        self._bodies = ((content, _etag(content)), (compressed, _etag(compressed)))

    def answer(
        self, http: HttpRequest, *, cache_control: str, headers: Mapping[str, str] | None = None
    ) -> HttpResponse:
        """The file, or 304 to who has it."""
        is_compressed = "gzip" in http.headers.get("accept-encoding", "")
        content, etag = self._bodies[is_compressed]
        fields = {**_SAFE, "ETag": etag, "Cache-Control": cache_control, "Vary": "Accept-Encoding", **(headers or {})}
        if etag in http.headers.get("if-none-match", ""):
            return HttpResponse(status_code=304, headers=fields)
        if is_compressed:
            fields["Content-Encoding"] = "gzip"
        return HttpResponse(content, headers={**fields, "Content-Type": self._type})


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'
