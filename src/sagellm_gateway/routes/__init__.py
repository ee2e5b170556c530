"""The routes, one module a group: an `APIRouter` of endpoints `(http: HttpRequest) -> HttpResponse`."""

from __future__ import annotations

from sagellm_gateway.routes import (
    admin,
    admin_watch,
    anthropic,
    chat,
    completions,
    docs,
    embeddings,
    info,
    models,
    ollama,
    page,
    responses,
    sessions,
    tokenize,
)

ROUTERS = (
    chat.router,
    ollama.router,
    anthropic.router,
    responses.router,
    completions.router,
    embeddings.router,
    tokenize.router,
    models.router,
    info.router,
    admin.router,
    admin_watch.router,
    sessions.router,
    page.router,
    docs.router,
)
