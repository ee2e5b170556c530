"""From a request for a response to a chat request: items become messages.

Items that belong to one turn of the assistant (its reasoning, its text, its calls) become one message, which is what
chat templates know. `developer` messages and instructions are system messages; those that lead the conversation become
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sagellm_gateway.responses.types import (
    AllowedTools,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    InputText,
    Item,
    MessageItem,
    Part,
    ReasoningItem,
    Refusal,
    ResponsesRequest,
    TextFormat,
    ToolChoiceFunction,
)
from sagellm_protocol import InvalidArgumentError
from sagellm_protocol.messages import ChatMessage, FunctionCall, FunctionDefinition, Tool, ToolCall
from sagellm_protocol.openai import ChatCompletionRequest, JsonSchemaFormat, NamedToolChoice, ResponseFormat
from sagellm_protocol.openai import ToolChoiceFunction as ChatToolChoiceFunction

# Where a field of the chat request comes from.
CHAT_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "structured_output": "text.format",
    "reasoning_effort": "reasoning.effort",
}
# Fields that mean the same in both requests.
_SAME = frozenset(
    (
        *("model", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
        *("stop", "stop_token_ids", "min_tokens", "ignore_eos"),
        *("priority", "cache_salt", "chat_template_kwargs"),
    )
)


def to_chat(call: ResponsesRequest, items: Sequence[Item]) -> ChatCompletionRequest:
    """The chat request for `call`, whose conversation is `items` (references resolved, earlier turns first).

    Raises `InvalidArgumentError` that names the field of `call`.
    """
    fields: dict[str, Any] = {
        **{name: getattr(call, name) for name in _SAME & call.model_fields_set},
        "messages": to_messages(items, call.instructions),
        "max_completion_tokens": call.max_output_tokens,
        "stream": bool(call.stream),
        "response_format": _response_format(None if call.text is None else call.text.format),
        "reasoning_effort": None if call.reasoning is None else call.reasoning.effort,
        **_tools(call),
    }
    if call.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": call.top_logprobs or 0}
    return ChatCompletionRequest(**{name: value for name, value in fields.items() if value is not None})


# ---- messages -----------------------------------------------------------------------------------------


def to_messages(items: Iterable[Item], instructions: str | None = None) -> list[ChatMessage]:
    """The messages of a conversation; raises `InvalidArgumentError` if there are none."""
    messages: list[ChatMessage] = []
    turn = _Turn()
    if instructions:
        messages.append(ChatMessage(role="system", content=instructions))
    for item in items:
        if turn.takes(item):
            continue
        messages += turn.end()
        if isinstance(item, FunctionCallOutputItem):
            messages.append(ChatMessage(role="tool", content=_output(item), tool_call_id=item.call_id))
        elif not turn.takes(item):  # it may begin the next turn
            assert isinstance(item, MessageItem), "references are resolved before"
            _add_message(messages, item)
    messages += turn.end()
    if not messages:
        raise InvalidArgumentError("input is empty; give a text or at least one message", field="input")
    return messages


class _Turn:
    """A turn of the assistant: reasoning, then text, then calls."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []

    def takes(self, item: Item) -> bool:
        """Whether `item` belongs to this turn, and was added to it."""
        if isinstance(item, ReasoningItem) and not self._texts and not self._calls:
            self._reasoning += [part.text for part in item.content or item.summary]
            return True
        if isinstance(item, MessageItem) and item.role == "assistant" and not self._calls:
            self._texts.append(_text(item.content))
            return True
        if isinstance(item, FunctionCallItem):
            function = FunctionCall(name=item.name, arguments=item.arguments)
            self._calls.append(ToolCall(id=item.call_id, function=function))
            return True
        return False

    def end(self) -> list[ChatMessage]:
        """The turn's message, if there is something in it; then the next turn begins."""
        reasoning, texts, calls = self._reasoning, self._texts, self._calls
        self._reasoning, self._texts, self._calls = [], [], []
        if not texts and not calls:
            return []
        message = ChatMessage(
            role="assistant",
            content="".join(texts),
            reasoning_content="".join(reasoning) or None,
            tool_calls=calls or None,
        )
        return [message]


def _add_message(messages: list[ChatMessage], item: MessageItem) -> None:
    role = "system" if item.role == "developer" else item.role
    text = _text(item.content)
    if role == "system" and [message.role for message in messages] == ["system"]:
        # Many templates take one system message, at the head.
        text = f"{messages.pop().text}\n\n{text}"
    messages.append(ChatMessage(role=role, content=text))


def _text(content: str | list[Part]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)


def _output(item: FunctionCallOutputItem) -> str:
    return item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)


# ---- tools and format ---------------------------------------------------------------------------------


def _tools(call: ResponsesRequest) -> dict[str, Any]:
    tools, choice = call.tools or [], call.tool_choice
    chosen: Any = choice
    if isinstance(choice, AllowedTools):
        _check_names([tool.name for tool in choice.tools], tools)
        allowed = {tool.name for tool in choice.tools}
        tools, chosen = [tool for tool in tools if tool.name in allowed], choice.mode
    elif isinstance(choice, ToolChoiceFunction):
        _check_names([choice.name], tools)
        chosen = NamedToolChoice(function=ChatToolChoiceFunction(name=choice.name))
    if not tools:
        # Without tools, "auto" and parallel calls mean nothing.
        return {"tool_choice": chosen} if chosen == "required" else {}
    return {
        "tools": [_tool(tool) for tool in tools],
        "tool_choice": chosen,
        "parallel_tool_calls": call.parallel_tool_calls,
    }


def _check_names(names: Sequence[str], tools: Sequence[FunctionTool]) -> None:
    known = [tool.name for tool in tools]
    for name in names:
        if name not in known:
            raise InvalidArgumentError(
                f"tool_choice names {name!r}, which is not in tools; use one of {', '.join(known) or '(none)'}",
                field="tool_choice",
            )


def _tool(tool: FunctionTool) -> Tool:
    definition = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(function=definition)


def _response_format(form: TextFormat | None) -> ResponseFormat | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return ResponseFormat(type="json_object")
    assert form.schema_ is not None, "the type says there is one"
    schema = JsonSchemaFormat(name=form.name, description=form.description, schema=form.schema_, strict=form.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)


def as_items(call: ResponsesRequest) -> list[Item]:
    """The input as items."""
    if isinstance(call.input, str):
        return [MessageItem(role="user", content=[InputText(text=call.input)])] if call.input else []
    return list(call.input)
