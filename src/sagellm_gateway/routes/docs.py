"""`/docs`: the API's own document to read and try, by Swagger UI, whose files a package brings: it works offline."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse

from sagellm_gateway.documents import PAGE, described
from sagellm_gateway.static_files import StaticFile
from sagellm_protocol import NotFoundError

router = APIRouter()

_LIBRARY = ("swagger-ui.css", "swagger-ui-bundle.js")
_DOCUMENT = b"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sageLLM API</title>
<link rel="icon" href="page/icon.svg">
<link rel="stylesheet" href="docs/swagger-ui.css">
<script src="docs/swagger-ui-bundle.js" defer></script>
<script src="docs/start.js" defer></script>
</head>
<body><main id="docs"></main></body>
</html>
"""
_START = b"""\
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
});
"""
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # the library writes styles into its elements
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@router.get("/docs", response_model=None, include_in_schema=False)
@described(media=PAGE, fails=(304,))
async def docs(http: HttpRequest) -> HttpResponse:
    """The API's document."""
    return _file("docs.html").answer(http, cache_control="no-cache", headers={"Content-Security-Policy": _POLICY})


@router.get("/docs/{name}", response_model=None, include_in_schema=False)
@described(media=PAGE, fails=(304, 404))
async def docs_file(http: HttpRequest, name: str) -> HttpResponse:
    """A file that it needs."""
    if name not in (*_LIBRARY, "start.js"):
        raise NotFoundError(f"the API's document has no file {name!r}; load /docs again")
    return _file(name).answer(http, cache_control="no-cache")


@cache
def _file(name: str) -> StaticFile:
    own = {"docs.html": _DOCUMENT, "start.js": _START}
    content = own.get(name) or files("fastapi_offline").joinpath(f"static/{name}").read_bytes()
    return StaticFile(name, content)
