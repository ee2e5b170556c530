"""`/tokenize`, `/detokenize` and `/tokenizer_info`: how a model splits texts, under vLLM's field names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response as HttpResponse
from pydantic import Field, JsonValue, model_validator

from sagellm_core.http import while_connected
from sagellm_gateway.body import read_call
from sagellm_gateway.context import gateway_of
from sagellm_gateway.documents import GENERATION, described
from sagellm_protocol import ChatMessage, InvalidArgumentError, Tool
from sagellm_protocol.fields import TokenId
from sagellm_protocol.messages import MAX_MESSAGES, MAX_TOOLS
from sagellm_protocol.model import EdgeModel

if TYPE_CHECKING:
    from typing_extensions import Self

    from sagellm_control_plane import ControlPlaneManager

router = APIRouter(tags=["sageLLM"])

# Beyond any model's context; splitting that much takes about a second.
MAX_CHARS = 4 * 2**20
MAX_TOKENS = 2**20


class TokenizeCall(EdgeModel):
    """The body of `POST /tokenize`: a text, or a conversation with what belongs to it.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    model: str = Field(min_length=1, max_length=512)
    prompt: str | None = Field(default=None, max_length=MAX_CHARS)
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, JsonValue] | None = Field(default=None, max_length=64)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidArgumentError("give either prompt or messages, and not both", field="prompt")
        if self.messages is None:
            for name in ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
                if getattr(self, name):
                    raise InvalidArgumentError(f"{name} belongs to messages; leave it out with a prompt", field=name)
        elif self.add_special_tokens:
            raise InvalidArgumentError(
                "add_special_tokens belongs to a prompt; a chat template writes its own special tokens",
                field="add_special_tokens",
            )
        return self

    def fields(self) -> dict[str, Any]:
        """The fields of the protocol's `TokenizeRequest`."""
        if self.messages is None:
            return {"prompt": self.prompt, "add_special_tokens": self.add_special_tokens is not False}
        variables, opens_answer = dict(self.chat_template_kwargs or {}), self.add_generation_prompt
        if self.continue_final_message:
            variables["continue_final_message"] = True
        return {
            "messages": self.messages,
            "tools": self.tools,
            "chat_template_kwargs": variables,
            "add_generation_prompt": not self.continue_final_message if opens_answer is None else opens_answer,
        }


class DetokenizeCall(EdgeModel):
    """The body of `POST /detokenize`."""

    model: str = Field(min_length=1, max_length=512)
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, fail_fast=True)


@router.post("/tokenize", response_model=None)
@described(body=TokenizeCall, fails=GENERATION)
@described(body=TokenizeCall, fails=GENERATION)
async def tokenize(http: HttpRequest) -> HttpResponse:
    """The tokens of a text or a conversation, as a request with it would have them."""
    call = await read_call(http, TokenizeCall, what="tokenize request")
    return _json(await while_connected(http, _tokens(gateway_of(http).manager, call)))


@router.post("/detokenize", response_model=None)
@described(body=DetokenizeCall, fails=GENERATION)
@described(body=DetokenizeCall, fails=GENERATION)
async def detokenize(http: HttpRequest) -> HttpResponse:
    """The text of tokens, special ones included."""
    call = await read_call(http, DetokenizeCall, what="detokenize request")
    text = await while_connected(http, gateway_of(http).manager.detokenize(call.model, call.tokens))
    return _json({"prompt": text})


@router.get("/tokenizer_info", response_model=None)
@described(query={"model": {"type": "string"}}, fails=(404, 503))
@described(query={"model": {"type": "string"}}, fails=GENERATION)
async def tokenizer_info(http: HttpRequest) -> HttpResponse:
    """The special tokens and the chat template of the default model, or of the one that `?model=` names."""
    gateway = gateway_of(http)
    name = http.query_params.get("model") or gateway.default_model
    model = await while_connected(http, gateway.manager.describe_model(name))
    return _json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.max_model_len,
            "vocab_size": model.vocab_size,
            "chat_template": model.chat_template,
            **model.special_tokens,
        }
    )


async def _tokens(manager: ControlPlaneManager, call: TokenizeCall) -> dict[str, Any]:
    model = await manager.describe_model(call.model)
    tokens = await manager.tokenize(call.model, **call.fields())
    return {
        "count": len(tokens),
        "max_model_len": model.max_model_len,
        "tokens": tokens,
        "token_strs": await manager.token_texts(call.model, tokens) if call.return_token_strs else None,
    }


def _json(value: Any) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(value), media_type="application/json")
