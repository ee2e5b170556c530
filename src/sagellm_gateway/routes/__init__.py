"""The routes, one module a group: an `APIRouter` of endpoints `(http: HttpRequest) -> HttpResponse`."""

from __future__ import annotations

from sagellm_gateway.routes import chat, completions, info, models

ROUTERS = (chat.router, completions.router, models.router, info.router)
