"""A turn of a kept conversation: what was said before goes in front, and the turn is kept when it is over.

An answer that the caller cut short is kept as far as it came; one that failed is not, so that the same message can be
sent again. That a caller has left is noticed late where much else goes on: a conversation that has gone on without the
answer, or was cleared meanwhile, does not get it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

from sagellm_gateway.context import Caller
from sagellm_gateway.pieces import Answer, AnswerChoice, AnswerEnd, Piece, collect
from sagellm_gateway.sessions.service import joined
from sagellm_protocol import NotFoundError
from sagellm_protocol.openai import ChatCompletionRequest

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

AnswerCall = Callable[[ChatCompletionRequest, Caller], Awaitable[Answer]]
StreamCall = Callable[[ChatCompletionRequest, Caller], AsyncGenerator[Piece, None]]


async def answer_in_session(
    gateway: Gateway, call: ChatCompletionRequest, caller: Caller, answer_call: AnswerCall
) -> Answer:
    """What `answer_call` makes of the whole conversation, kept in the session that `call` names."""
    session_id, new = _session_id(call), call.messages
    whole, _ = await _whole(gateway, call, caller)
    answer = await answer_call(whole, caller)
    await gateway.sessions.remember(session_id, caller, new, answer)
    return answer


async def stream_in_session(
    gateway: Gateway, call: ChatCompletionRequest, caller: Caller, stream_call: StreamCall
) -> AsyncGenerator[Piece, None]:
    """As `answer_in_session`, piece by piece. The turn is kept before the last piece goes out."""
    pieces: list[Piece] = []
    whole, as_of = await _whole(gateway, call, caller)
    is_kept = False
    try:
        async with aclosing(stream_call(whole, caller)) as stream:
            async for piece in stream:
                pieces.append(piece)
                if isinstance(piece, AnswerEnd):
                    is_kept = True
                    await gateway.sessions.remember(_session_id(call), caller, call.messages, collect(pieces))
                yield piece
    except Exception:
        is_kept = True  # nothing of a failed answer is
        raise
    finally:
        answer = collect(pieces)
        if not is_kept and _has_text(answer.choices):
            # Beside this task, which is being cancelled.
            gateway.background(_remember_cut(gateway, call, caller, answer, as_of))


async def _remember_cut(
    gateway: Gateway, call: ChatCompletionRequest, caller: Caller, answer: Answer, as_of: float
) -> None:
    with suppress(NotFoundError):  # who left may have deleted the session, too
        await gateway.sessions.remember(_session_id(call), caller, call.messages, answer, unchanged_since=as_of)


async def _whole(gateway: Gateway, call: ChatCompletionRequest, caller: Caller) -> tuple[ChatCompletionRequest, float]:
    """The call with the conversation before it, and when that was changed last."""
    history, as_of = await gateway.sessions.history(_session_id(call), caller)
    # Validated anew: together they may be more than a call may hold.
    whole = ChatCompletionRequest(**{**call.given(), "messages": joined(history, call.messages), "session_id": None})
    return whole, as_of


def _session_id(call: ChatCompletionRequest) -> str:
    assert call.session_id is not None, "only calls that name a session come here"
    return call.session_id


def _has_text(choices: Sequence[AnswerChoice]) -> bool:
    return bool(choices) and bool(choices[0].text or choices[0].reasoning)
