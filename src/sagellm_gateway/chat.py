"""Conversations: a chat request in, the pieces of its answer out, for whatever API asked.

Promises: what a request asks for is done or refused by name, never ignored; closing a stream aborts the request; pieces
come in the order that `sagellm_gateway.pieces` names, and an error is raised where it happened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from operator import attrgetter
from typing import TYPE_CHECKING

from sagellm_gateway.chat_plan import ChatPlanner
from sagellm_gateway.choice_reader import ChoiceReader
from sagellm_gateway.context import Caller
from sagellm_gateway.pieces import Answer, AnswerEnd, AnswerStart, OutputCount, Piece
from sagellm_gateway.sessions.turns import answer_in_session, stream_in_session
from sagellm_protocol import StreamEventDelta, StreamEventEnd
from sagellm_protocol.openai import ChatCompletionRequest

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

_index_of = attrgetter("index")


class ChatService:
    """Answers conversations through the gateway's control plane."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._planner = ChatPlanner(gateway)

    async def answer(self, call: ChatCompletionRequest, caller: Caller) -> Answer:
        """The whole answer; the error of a request that failed is raised."""
        if call.session_id is not None:
            return await answer_in_session(self._gateway, call, caller, self.answer)
        plan = await self._planner.plan(call, caller)
        response = (await self._gateway.answers.execute(plan.request)).raise_for_error()
        choices = [plan.read(output) for output in sorted(response.outputs, key=_index_of)]
        return Answer(choices, response.usage, response.metrics)

    async def count_prompt_tokens(self, call: ChatCompletionRequest, caller: Caller) -> int:
        """How many tokens the prompt of `call` has."""
        request = (await self._planner.plan(call, caller)).request
        token_ids = await self._gateway.manager.tokenize(
            request.model,
            messages=request.messages,
            tools=request.tools,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        return len(token_ids)

    async def stream(self, call: ChatCompletionRequest, caller: Caller) -> AsyncGenerator[Piece, None]:
        """The pieces of the answer as they are made; an error is raised where it happens."""
        if call.session_id is not None:
            async with aclosing(stream_in_session(self._gateway, call, caller, self.stream)) as turn:
                async for piece in turn:
                    yield piece
            return
        plan = await self._planner.plan(call, caller)
        readers: dict[int, ChoiceReader] = {}
        counts_usage = call.stream_options is not None and call.stream_options.counts_usage
        num_output_tokens = 0
        async with aclosing(self._gateway.answers.stream(plan.request)) as events:
            async for event in events:
                if isinstance(event, StreamEventDelta):
                    reader = readers.get(event.index) or readers.setdefault(event.index, plan.reader(event.index))
                    pieces = reader.feed(event.chunk, event.logprobs)
                    if counts_usage:
                        num_output_tokens += len(event.chunk_tokens)
                        pieces = [OutputCount(num_output_tokens), *pieces]
                elif isinstance(event, StreamEventEnd):
                    if event.error is not None:
                        raise event.error.to_exception()
                    pieces = []
                    for output in event.outputs:
                        pieces += (readers.get(output.index) or plan.reader(output.index)).end(output)
                    pieces.append(AnswerEnd(event.usage, event.metrics))
                else:
                    pieces = [AnswerStart(event.prompt_tokens)]
                for piece in pieces:
                    yield piece
