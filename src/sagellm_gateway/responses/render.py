"""The forms of the Responses API: the response object, whole or growing, and the events of its stream.

Events are counted by `sequence_number` and come in OpenAI's order: created, in_progress; for each output item added,
its parts and deltas, done; at last completed, incomplete or failed. A text's deltas are made without encoding anything
but the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sagellm_gateway.pieces import (
    Answer,
    AnswerEnd,
    AnswerStart,
    ChoiceEnd,
    ReasoningPiece,
    TextPiece,
    ToolCallPiece,
)
from sagellm_gateway.responses.types import ResponsesRequest
from sagellm_gateway.streams import FramingWriter
from sagellm_gateway.writing import encode, logprob_entries
from sagellm_protocol import ErrorCode, SageLLMError, TokenLogprob, Usage
from sagellm_protocol.ids import random_hex
from sagellm_protocol.openai.chat import ChatFinishReason

# Why an answer ended before its own end, in this API's words.
_INCOMPLETE: dict[ChatFinishReason, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}


def new_id(prefix: str) -> str:
    """A fresh id of the API's kind: `resp_...`, `msg_...`."""
    return f"{prefix}_{random_hex()}"


class ResponseDraft:
    """A response object in the making: what the request asked for, then the output as it comes."""

    def __init__(self, call: ResponsesRequest) -> None:
        self.id = new_id("resp")
        self.output: list[dict[str, Any]] = []
        self._created_at = int(time.time())
        self._call = call
        self._finish_reason: ChatFinishReason = "stop"

    def end(self, finish_reason: ChatFinishReason) -> None:
        """The output is complete, or cut off by `finish_reason`."""
        self._finish_reason = finish_reason

    @property
    def status(self) -> str:
        """The status of the response that has ended, and of the item that was its last."""
        return "incomplete" if self._finish_reason in _INCOMPLETE else "completed"

    @property
    def kind_of_thoughts(self) -> str:
        """Whether a reasoning item tells its text as such or, to who asked for one, as its summary."""
        return "summary" if self._call.wants_summary else "reasoning"

    def add_answer(self, answer: Answer) -> dict[str, Any]:
        """The body of a response whose answer is there as a whole."""
        choice = answer.choices[0]
        self.end(choice.finish_reason)
        if choice.reasoning:
            kind = self.kind_of_thoughts
            self.output.append(_reasoning_item(new_id("rs"), choice.reasoning, "completed", kind=kind))
        if choice.text or not choice.tool_calls:
            logprobs = logprob_entries(choice.logprobs or ())
            self.output.append(_message_item(new_id("msg"), choice.text, logprobs, "completed"))
        for call in choice.tool_calls:
            function = call.function
            self.output.append(_call_item(new_id("fc"), call.id, function.name, function.arguments, "completed"))
        self.output[-1]["status"] = self.status
        return self.body(self.status, usage=answer.usage)

    def body(self, status: str, *, usage: Usage | None = None, error: SageLLMError | None = None) -> dict[str, Any]:
        """The response object at this moment."""
        call = self._call
        incomplete = _INCOMPLETE.get(self._finish_reason) if status == "incomplete" else None
        reasoning, text = call.reasoning, call.text
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None if error is None else _error(error),
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "instructions": call.instructions,
            "max_output_tokens": call.max_output_tokens,
            "max_tool_calls": call.max_tool_calls,
            "model": call.model,
            "output": list(self.output),
            "parallel_tool_calls": call.parallel_tool_calls is not False,
            "previous_response_id": call.previous_response_id,
            "prompt_cache_key": call.prompt_cache_key,
            "reasoning": {
                "effort": reasoning and reasoning.effort,
                "summary": "detailed" if call.wants_summary else None,
            },
            "safety_identifier": call.safety_identifier,
            "service_tier": "default",
            "store": call.store is not False,
            "temperature": call.temperature,
            "text": {
                "format": _text_format(call),
                "verbosity": text.verbosity if text and text.verbosity else "medium",
            },
            "tool_choice": _tool_choice(call),
            "tools": [_tool(tool) for tool in call.tools or ()],
            "top_logprobs": call.top_logprobs or 0,
            "top_p": call.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": call.user,
            "metadata": call.metadata or {},
        }


class EventWriter(FramingWriter):
    """The events of one streamed response; `on_end` gets the response when it has ended, before its last event."""

    def __init__(self, draft: ResponseDraft, on_end: Callable[[dict[str, Any]], None]) -> None:
        self._draft = draft
        self._on_end = on_end
        self._number = 0
        self._item: _OpenItem | None = None

    def start(self, piece: AnswerStart) -> bytes:
        """The response without output, twice."""
        return self._state("response.created", "in_progress") + self._state("response.in_progress", "in_progress")

    def text(self, piece: TextPiece) -> bytes:
        """A delta of a message."""
        return self._delta("message", piece.text, piece.logprobs)

    def reasoning(self, piece: ReasoningPiece) -> bytes:
        """A delta of a reasoning item."""
        return self._delta(self._draft.kind_of_thoughts, piece.text, None)

    def tool_call(self, piece: ToolCallPiece) -> bytes:
        """An item for each call, its arguments as deltas."""
        opened = b""
        if piece.name is not None:
            opened = self._close("completed")
            call_id = piece.id or new_id("call")
            opened += self._open(_OpenItem("function_call", len(self._draft.output), call_id, piece.name))
        assert self._item is not None, "a call begins with its name"
        if not piece.arguments:
            return opened
        self._item.texts.append(piece.arguments)
        return opened + self._delta_event(piece.arguments, b"}\n\n")

    def choice_end(self, piece: ChoiceEnd) -> bytes:
        """The end of the item that is open."""
        self._draft.end(piece.finish_reason)
        return self._close(self._draft.status)

    def end(self, piece: AnswerEnd) -> bytes:
        """The whole response."""
        return self._last(self._draft.status, self._draft.body(self._draft.status, usage=piece.usage))

    def fail(self, error: SageLLMError) -> bytes:
        """The event of a response that failed."""
        return self._close("incomplete") + self._last("failed", self._draft.body("failed", error=error))

    def _delta(self, kind: str, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        if not text and not logprobs:
            return b""
        opened = b""
        if self._item is None or self._item.kind != kind:
            opened = self._close("completed") + self._open(_OpenItem(kind, len(self._draft.output)))
        assert self._item is not None
        self._item.texts.append(text)
        if kind != "message":
            return opened + self._delta_event(text, b"}\n\n")
        if not logprobs:
            return opened + self._delta_event(text, b',"logprobs":[]}\n\n')
        entries = logprob_entries(logprobs)
        self._item.logprobs += entries
        return opened + self._delta_event(text, b',"logprobs":%s}\n\n' % encode(entries))

    def _delta_event(self, text: str, tail: bytes) -> bytes:
        assert self._item is not None
        number = self._number
        self._number += 1
        return b"%s%d%s%s%s" % (self._item.delta_head, number, self._item.delta_place, encode(text), tail)

    def _open(self, item: _OpenItem) -> bytes:
        self._item = item
        events = self._event("response.output_item.added", output_index=item.index, item=item.body("in_progress"))
        if item.part_name:
            events += self._event(f"response.{item.part_name}.added", **item.place, part=item.part())
        return events

    def _close(self, status: str) -> bytes:
        item, self._item = self._item, None
        if item is None:
            return b""
        text = "".join(item.texts)
        done: dict[str, Any] = {"text": text}
        if item.kind == "function_call":
            done = {"arguments": text, "name": item.call_name}
        elif item.kind == "message":
            done["logprobs"] = item.logprobs
        events = self._event(f"response.{item.text_name}.done", **item.place, **done)
        if item.part_name:
            events += self._event(f"response.{item.part_name}.done", **item.place, part=item.part(whole=True))
        body = item.body(status, whole=True)
        self._draft.output.append(body)
        return events + self._event("response.output_item.done", output_index=item.index, item=body)

    def _last(self, status: str, body: dict[str, Any]) -> bytes:
        self._on_end(body)
        return self._event(f"response.{status}", response=body)

    def _state(self, kind: str, status: str) -> bytes:
        return self._event(kind, response=self._draft.body(status))

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


class _OpenItem:
    """The output item that is being written."""

    def __init__(self, kind: str, index: int, call_id: str = "", call_name: str = "") -> None:
        self.kind = kind
        self.index = index
        self.call_id = call_id
        self.call_name = call_name
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self._id = new_id(_PREFIXES[kind])
        self.text_name, self.part_name, index_name = _NAMES[kind]
        self.place: dict[str, Any] = {"item_id": self._id, "output_index": index}
        if index_name:
            self.place[index_name] = 0
        event = f"response.{self.text_name}.delta".encode()
        self.delta_head = b'event: %s\ndata: {"type":"%s","sequence_number":' % (event, event)
        self.delta_place = b"," + encode(self.place)[1:-1] + b',"delta":'

    def part(self, *, whole: bool = False) -> dict[str, Any]:
        text = "".join(self.texts) if whole else ""
        if self.kind == "message":
            return _text_part(text, self.logprobs if whole else [])
        return _thought_part(text, self.kind)

    def body(self, status: str, *, whole: bool = False) -> dict[str, Any]:
        text = "".join(self.texts) if whole else None
        if self.kind == "function_call":
            return _call_item(self._id, self.call_id, self.call_name, text or "", status)
        if self.kind == "message":
            return _message_item(self._id, text, self.logprobs if whole else [], status)
        return _reasoning_item(self._id, text, status, kind=self.kind)


_PREFIXES = {"message": "msg", "reasoning": "rs", "summary": "rs", "function_call": "fc"}
# How events call an item's text, the part that it stands in, and the number of that.
_NAMES = {
    "message": ("output_text", "content_part", "content_index"),
    "reasoning": ("reasoning_text", "content_part", "content_index"),
    "summary": ("reasoning_summary_text", "reasoning_summary_part", "summary_index"),
    "function_call": ("function_call_arguments", "", ""),
}


# ---- items and fields ---------------------------------------------------------------------------------


def _message_item(item_id: str, text: str | None, logprobs: list[dict[str, Any]], status: str) -> dict[str, Any]:
    content = [] if text is None else [_text_part(text, logprobs)]
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}


def _reasoning_item(item_id: str, text: str | None, status: str, *, kind: str) -> dict[str, Any]:
    parts = [] if text is None else [_thought_part(text, kind)]
    summary, content = (parts, []) if kind == "summary" else ([], parts)
    return {"id": item_id, "type": "reasoning", "summary": summary, "content": content, "status": status}


def _thought_part(text: str, kind: str) -> dict[str, Any]:
    return {"type": "summary_text" if kind == "summary" else "reasoning_text", "text": text}


def _call_item(item_id: str, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "arguments": arguments,
        "call_id": call_id,
        "name": name,
    }


def _text_format(call: ResponsesRequest) -> dict[str, Any]:
    form = None if call.text is None else call.text.format
    if form is None or form.type != "json_schema":
        return {"type": "text" if form is None else form.type}
    return {
        "type": form.type,
        "name": form.name,
        "description": form.description,
        "schema": form.schema_,
        "strict": form.strict is True,
    }


def _tool(tool: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict is True,
    }


def _tool_choice(call: ResponsesRequest) -> Any:
    choice = call.tool_choice
    return choice or "auto" if choice is None or isinstance(choice, str) else choice.model_dump(mode="json")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _error(error: SageLLMError) -> dict[str, Any]:
    is_limit = error.code is ErrorCode.RESOURCE_EXHAUSTED
    is_wrong = error.code is ErrorCode.INVALID_ARGUMENT
    code = "rate_limit_exceeded" if is_limit else "invalid_prompt" if is_wrong else "server_error"
    return {"code": code, "message": error.message}
