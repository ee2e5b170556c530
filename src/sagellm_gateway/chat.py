"""`/v1/chat/completions`: whole answers and streams, over `Answers`.

What the API offers and no engine does yet (tools, response formats, reasoning effort) is refused by name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from sagellm_core.answers import DONE, Answers, new_head
from sagellm_protocol import StreamEventDelta, StreamEventEnd, UnsupportedError
from sagellm_protocol.openai import ChatCompletion, ChatCompletionRequest
from sagellm_protocol.openai.render import chat_chunk, chat_completion, chat_end, chat_start, chat_usage, to_json


def refuse_unbuilt(call: ChatCompletionRequest) -> None:
    """Raise `UnsupportedError` for what would change the answer and is not built."""
    wanted = {
        "tools": call.tools,
        "tool_choice": call.tool_choice not in (None, "none", "auto"),
        "parallel_tool_calls": call.parallel_tool_calls,
        "response_format": call.response_format is not None and call.response_format.type != "text",
        "reasoning_effort": call.reasoning_effort,
    }
    for field, is_wanted in wanted.items():
        if is_wanted:
            raise UnsupportedError(f"{field} is not supported: answers are plain text; leave it out", field=field)


async def answer_chat(answers: Answers, call: ChatCompletionRequest) -> ChatCompletion:
    """The whole answer; the error of a request that failed is raised."""
    response = (await answers.execute(call.to_request())).raise_for_error()
    return chat_completion(new_head("chatcmpl", call.model), response)


async def stream_chat(answers: Answers, call: ChatCompletionRequest) -> AsyncGenerator[str, None]:
    """The messages of a streamed answer; the error of a request that failed is raised where it happened."""
    head = new_head("chatcmpl", call.model)
    async with aclosing(answers.stream(call.to_request())) as events:
        async for event in events:
            if isinstance(event, StreamEventDelta):
                yield to_json(chat_chunk(head, event))
            elif isinstance(event, StreamEventEnd):
                if event.error is not None:
                    raise event.error.to_exception()
                yield to_json(chat_end(head, event))
                if call.stream_options is not None and call.stream_options.include_usage:
                    yield to_json(chat_usage(head, event))
            else:
                yield to_json(chat_start(head, num_choices=call.n or 1))
    yield DONE
