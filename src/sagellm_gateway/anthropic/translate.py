"""From a request for a message to a chat request.

A user's message with tool results becomes one `tool` message each, then the rest. Blocks of text are paragraphs, and so
are messages of one role in a row: as the original, and because many chat templates want roles in turn. The last message
may be the beginning of the answer, which the model then continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from sagellm_gateway.anthropic.types import (
    Block,
    CountTokensRequest,
    Message,
    MessagesRequest,
    TextBlock,
    Texts,
    ThinkingBlock,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
)
from sagellm_protocol import InvalidArgumentError
from sagellm_protocol.messages import ChatMessage, FunctionCall, FunctionDefinition, Tool, ToolCall
from sagellm_protocol.openai import (
    ChatCompletionRequest,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    ToolChoiceFunction,
)

# Where a field of the chat request comes from.
CHAT_FIELDS = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "structured_output": "output_config.format",
}

# Claude Code begins its instructions by saying which client it is, with a number of the conversation: nothing for the
# model, and no prefix of another conversation's prompt would be found in the cache.
_CLIENT_MARK = "x-anthropic-billing-header:"

# Marks a result that is an error, for which chat templates have no place.
_ERROR_MARK = "Error: "

# Instructions amid a conversation, which templates forget or refuse; agents explain this mark to the model.
_REMINDER = "<system-reminder>\n{}\n</system-reminder>"


def to_chat(call: MessagesRequest) -> ChatCompletionRequest:
    """The chat request for `call`; raises an error that names the field of `call`."""
    call.refuse_unsupported()
    fields: dict[str, Any] = {
        "model": call.model,
        "messages": to_messages(call),
        "max_completion_tokens": call.max_tokens,
        "temperature": call.temperature,
        "top_p": call.top_p,
        "top_k": call.top_k,
        "stop": call.stop_sequences or None,
        "stream": call.stream,
        "user": None if call.metadata is None else call.metadata.user_id,
        "response_format": _response_format(call),
        "chat_template_kwargs": template_options(call),
        **_tools(call),
    }
    return ChatCompletionRequest(**{name: value for name, value in fields.items() if value is not None})


def to_messages(call: MessagesRequest | CountTokensRequest) -> list[ChatMessage]:
    """The conversation."""
    messages: list[ChatMessage] = []
    system = call.system or ()
    if isinstance(system, list):
        system = [block for block in system if not block.text.startswith(_CLIENT_MARK)]
    if system:
        messages.append(ChatMessage(role="system", content=_joined(system)))
    for message in call.messages:
        is_amid = bool(messages) and messages[-1].role != "system"
        messages += _assistant(message) if message.role == "assistant" else _other(message, is_amid=is_amid)
    return [_as_one(list(run)) for _, run in groupby(messages, _run_of)]


def to_tools(call: MessagesRequest | CountTokensRequest) -> list[Tool] | None:
    """The tools that the prompt describes."""
    if not call.tools or (call.tool_choice is not None and call.tool_choice.type == "none"):
        return None
    return [_tool(tool) for tool in call.tools]


def template_options(call: MessagesRequest | CountTokensRequest) -> dict[str, Any]:
    """Variables of the chat template: no thinking unless it is asked for; an answer that has begun goes on.

    The effort is a hint, which agents send to any model: a template that knows none doesn't look at it.
    """
    options: dict[str, Any] = {"enable_thinking": call.thinking is not None and call.thinking.is_on}
    if call.output_config is not None and call.output_config.effort is not None:
        options["reasoning_effort"] = call.output_config.effort
    last = call.messages[-1]
    if last.role == "assistant":
        is_text = isinstance(last.content, str) or all(isinstance(block, TextBlock) for block in last.content)
        if not is_text:
            raise InvalidArgumentError(
                "messages: the last message is the beginning of the answer and may only hold text; "
                "add the tool results or leave it out",
                field=f"messages[{len(call.messages) - 1}].content",
            )
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    return options


# ---- messages -----------------------------------------------------------------------------------------


def _run_of(message: ChatMessage) -> str | int:
    """Equal for messages in a row that make up one; those that hold more than a text stay alone."""
    is_text = message.role != "tool" and message.tool_calls is None and message.reasoning_content is None
    return message.role if is_text else id(message)


def _as_one(run: list[ChatMessage]) -> ChatMessage:
    if len(run) == 1:
        return run[0]
    return run[0].model_copy(update={"content": "\n\n".join(message.text for message in run if message.text)})


def _other(message: Message, *, is_amid: bool) -> list[ChatMessage]:
    if message.role == "system" and is_amid:
        return [ChatMessage(role="user", content=_REMINDER.format(_joined(message.content)))]
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    messages = [_tool_message(block) for block in message.content if isinstance(block, ToolResultBlock)]
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    if texts or not messages:
        messages.append(ChatMessage(role=message.role, content=_joined(texts)))
    return messages


def _tool_message(block: ToolResultBlock) -> ChatMessage:
    text = _joined(block.content)
    return ChatMessage(
        role="tool", content=_ERROR_MARK + text if block.is_error else text, tool_call_id=block.tool_use_id
    )


def _assistant(message: Message) -> list[ChatMessage]:
    if isinstance(message.content, str):
        return [ChatMessage(role="assistant", content=message.content)]
    calls = [_call(block) for block in message.content if isinstance(block, ToolUseBlock)]
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    return [
        ChatMessage(
            role="assistant",
            content="".join(block.text for block in message.content if isinstance(block, TextBlock)),
            reasoning_content="".join(thoughts) or None,
            tool_calls=calls or None,
        )
    ]


def _call(block: ToolUseBlock) -> ToolCall:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments))


def _joined(texts: Texts | Iterable[Block]) -> str:
    if isinstance(texts, str):
        return texts
    return "\n\n".join(block.text for block in texts if isinstance(block, TextBlock))


# ---- tools and format ---------------------------------------------------------------------------------


def _tools(call: MessagesRequest) -> dict[str, Any]:
    tools, choice = to_tools(call), call.tool_choice
    if choice is None:
        return {"tools": tools}
    names = [tool.name for tool in call.tools or ()]
    if choice.type in ("any", "tool") and not names:
        raise InvalidArgumentError("tool_choice needs tools; give tools or leave tool_choice out", field="tool_choice")
    if choice.name is not None and choice.name not in names:
        raise InvalidArgumentError(
            f"tool_choice.name is {choice.name!r}, which is not in tools; use one of {', '.join(names)}",
            field="tool_choice.name",
        )
    if not tools:
        return {}
    chosen: Any = {"auto": "auto", "any": "required"}.get(choice.type)
    if choice.name is not None:
        chosen = NamedToolChoice(function=ToolChoiceFunction(name=choice.name))
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    return {"tools": tools, "tool_choice": chosen, "parallel_tool_calls": parallel}


def _tool(tool: ToolDefinition) -> Tool:
    definition = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(function=definition)


def _response_format(call: MessagesRequest) -> ResponseFormat | None:
    wanted = call.output_format if call.output_config is None else call.output_config.format or call.output_format
    if wanted is None:
        return None
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=wanted.schema_))
