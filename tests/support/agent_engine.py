"""An engine that behaves as a model with tools: it calls each once, then answers, in the form that is asked for."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from sagellm_protocol import ModelDescription, Request, StreamEvent
from scripted_engine import ScriptedEngine

# Hermes' family.
_TEMPLATE = '{% if tools %}<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'
_FILLED = json.dumps({"city": "Bern"})


class AgentEngine(ScriptedEngine):
    """Its calls and answers in JSON are `{"city": "Bern"}`, whatever the schema; its text is what a tool said last."""

    async def describe_model(self) -> ModelDescription:
        return (await super().describe_model()).model_copy(update={"chat_template": _TEMPLATE})

    async def stream(self, request: Request, /) -> AsyncGenerator[StreamEvent, None]:
        messages = request.messages or []
        self.script[str(messages[-1].content)] = _answer(request)
        async for event in super().stream(request):
            yield event


def _answer(request: Request) -> str:
    messages = request.messages or []
    called = {call.function.name for message in messages for call in message.tool_calls or ()}
    for tool in request.tools or ():
        if tool.function.name not in called:
            return f'<tool_call>\n{{"name": "{tool.function.name}", "arguments": {_FILLED}}}\n</tool_call>'
    form = request.structured_output
    # Beside tools a form is a rule of the grammar; a strict tool's grammar has none.
    is_formed = form is not None and (form.grammar is None or "\nanswer: " in form.grammar)
    return _FILLED if is_formed else f"It is said: {messages[-1].text}"
