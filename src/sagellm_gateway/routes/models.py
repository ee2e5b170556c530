"""`/v1/models`, in OpenAI's form or in Anthropic's for its clients: both have this path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse

from sagellm_control_plane import EngineState
from sagellm_gateway.anthropic.models import model_info, model_list
from sagellm_gateway.context import caller_of, gateway_of
from sagellm_gateway.documents import described
from sagellm_protocol import NotFoundError
from sagellm_protocol.openai import ModelCard, ModelList

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=None)
@described()
async def models(http: HttpRequest) -> HttpResponse:
    """The models that can be asked for."""
    cards = model_cards(gateway_of(http))
    if caller_of(http).speaks_anthropic:
        return JSONResponse(model_list(list(cards.values())))
    return JSONResponse(ModelList(data=list(cards.values())).model_dump(mode="json", exclude_none=True))


@router.get("/v1/models/{model:path}", response_model=None)
@described(fails=(404,))
async def model(http: HttpRequest, model: str) -> HttpResponse:
    """One model."""
    cards = model_cards(gateway_of(http))
    if model not in cards:
        raise NotFoundError(f"no model {model!r}; there is {', '.join(cards) or 'none'}", field="model")
    if caller_of(http).speaks_anthropic:
        return JSONResponse(model_info(cards[model]))
    return JSONResponse(cards[model].model_dump(mode="json", exclude_none=True))


def model_cards(gateway: Gateway) -> dict[str, ModelCard]:
    """One card a model: of the engines that can take requests for it, that with the longest context."""
    cards: dict[str, ModelCard] = {}
    for info in gateway.manager.list_engines():
        if info.state in (EngineState.READY, EngineState.STARTING):
            known = cards[info.model].max_model_len or 0 if info.model in cards else 0
            length = max(known, info.max_model_len)
            cards[info.model] = ModelCard(id=info.model, root=info.model, created=gateway.created, max_model_len=length)
    return cards
