"""From Ollama's calls to chat requests.

Ollama's tool calls and results need no ids: those that have none get some here, a result that of the first call of its
name (or of any) that has no result yet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sagellm_gateway.ollama.types import ChatCall, Format, GenerateCall, Message, Options, ToolChoice
from sagellm_protocol import messages as chat
from sagellm_protocol.fields import MAX_INT32
from sagellm_protocol.openai import (
    ChatCompletionRequest,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    ToolChoiceFunction,
)

# Where a field of the chat request comes from.
CHAT_FIELDS = {
    "max_completion_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
    "structured_output": "format",
    "reasoning_effort": "think",
}


def to_chat(call: ChatCall | GenerateCall, *, model: str) -> ChatCompletionRequest:
    """The chat request for `call` to the served model `model`; raises what names the field of `call`."""
    if isinstance(call, GenerateCall):
        call.refuse_unsupported()
        messages, tools, choice = _prompt_messages(call), None, None
    else:
        messages, tools, choice = _with_ids(call.messages or ()), call.tools, call.tool_choice
    options = {} if call.options is None else _sampling(call.options)
    fields: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "tools": tools or None,
        "tool_choice": _named(choice) if isinstance(choice, ToolChoice) else choice,
        "stream": call.is_streamed,
        "response_format": _response_format(call.format),
        "reasoning_effort": call.think if isinstance(call.think, str) else None,
        "chat_template_kwargs": _template_options(call, messages) or None,
        "temperature": call.temperature,
        "top_p": call.top_p,
        "max_completion_tokens": call.max_output_tokens,
        **{name: value for name, value in options.items() if value is not None},
    }
    if call.logprobs:
        fields |= {"logprobs": True, "top_logprobs": call.top_logprobs or 0}
    return ChatCompletionRequest(**{name: value for name, value in fields.items() if value is not None})


def _named(choice: ToolChoice) -> NamedToolChoice:
    return NamedToolChoice(function=ToolChoiceFunction(name=choice.name))


def _prompt_messages(call: GenerateCall) -> list[chat.ChatMessage]:
    messages = [chat.ChatMessage(role="user", content=call.prompt or "")]
    return [chat.ChatMessage(role="system", content=call.system), *messages] if call.system else messages


def _template_options(call: ChatCall | GenerateCall, messages: Sequence[chat.ChatMessage]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if isinstance(call.think, bool):
        options["enable_thinking"] = call.think
    last = messages[-1]
    if last.role == "assistant" and not last.tool_calls:
        # The beginning of the answer, which the model continues.
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    return options


# ---- messages -----------------------------------------------------------------------------------------


def _with_ids(messages: Sequence[Message]) -> list[chat.ChatMessage]:
    made: list[chat.ChatMessage] = []
    open_calls: list[chat.ToolCall] = []  # those without a result
    for message in messages:
        calls = [_call(f"call_{len(made)}_{number}", call) for number, call in enumerate(message.tool_calls or ())]
        fields: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "tool":
            fields |= {"tool_call_id": _answered(message, open_calls), "name": message.tool_name}
        elif message.role == "assistant":
            fields |= {"tool_calls": calls or None, "reasoning_content": message.thinking}
            open_calls = calls
        made.append(chat.ChatMessage(**fields))
    return made


def _call(fallback_id: str, call: Any) -> chat.ToolCall:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    function = chat.FunctionCall(name=call.function.name, arguments=arguments)
    return chat.ToolCall(id=call.id or fallback_id, function=function)


def _answered(message: Message, open_calls: list[chat.ToolCall]) -> str:
    if message.tool_call_id is not None:
        return message.tool_call_id
    fitting = [call for call in open_calls if message.tool_name in (None, call.function.name)]
    if not fitting:
        return "call_unknown"
    open_calls.remove(fitting[0])
    return fitting[0].id


# ---- options ------------------------------------------------------------------------------------------


def _sampling(options: Options) -> dict[str, Any]:
    options.refuse_unsupported()
    num_predict = options.num_predict
    return {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "seed": None if options.seed is None or options.seed < 0 else options.seed,
        "stop": options.stop or None,
        # What doesn't fit into the context is cut by the engine.
        "max_completion_tokens": MAX_INT32 if num_predict is not None and num_predict < 0 else num_predict,
    }


def _response_format(form: Format) -> ResponseFormat | None:
    if form is None:
        return None
    if form == "json":
        return ResponseFormat(type="json_object")
    assert isinstance(form, dict)
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=form))
