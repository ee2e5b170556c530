"""`sage-llm chat` with an engine of this process; Ctrl-C ends one answer, Ctrl-D the conversation."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from sagellm.cli.conversation import Messages, converse, report_error, report_stop, without_oldest_turn
from sagellm.cli.session import end_line, make_engine, show_text
from sagellm_core.command import print_quietly
from sagellm_protocol import SageLLMError, SamplingParams, StreamEventDelta, StreamEventEnd

if TYPE_CHECKING:
    from sagellm.cli.options import SamplingFlags
    from sagellm_core import LLMEngine
    from sagellm_core.options import EngineFlags


def chat_loop(flags: EngineFlags, sampling: SamplingFlags, *, system: str | None) -> None:
    """Read, answer, repeat; see `sage-llm chat --help`."""
    params = sampling.sampling()
    engine = make_engine(flags)
    with _event_loop() as loop:
        loop.run_until_complete(engine.start())
        try:
            converse(
                engine.config.model_path,
                lambda messages: loop.run_until_complete(_answer_until_interrupt(engine, messages, params)),
                system,
            )
        finally:
            loop.run_until_complete(engine.stop())


async def _answer_until_interrupt(engine: LLMEngine, messages: Messages, sampling: SamplingParams) -> str:
    """Print one answer and return what was said of it: until its end, an error or Ctrl-C."""
    said: list[str] = []
    answering = asyncio.ensure_future(_answer(engine, messages, sampling, said))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        await answering
    except asyncio.CancelledError:
        report_stop()
    except SageLLMError as error:
        report_error(error.code, error.message)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return "".join(said)


async def _answer(engine: LLMEngine, messages: Messages, sampling: SamplingParams, said: list[str]) -> None:
    async with aclosing(engine.stream(messages=fit(engine, messages), sampling_params=sampling)) as events:
        async for event in events:
            if isinstance(event, StreamEventDelta) and event.index == 0:
                said.append(event.chunk)
                show_text(event.chunk)
            elif isinstance(event, StreamEventEnd):
                if event.error is not None:
                    raise event.error.to_exception()
                print(flush=True)
                print_quietly(end_line(event))


def fit(engine: LLMEngine, messages: Messages) -> Messages:
    """The newest messages that leave half of the model's length for the answer; the system message stays."""
    room = engine.config.max_model_len // 2
    while len(engine.tokenizer.encode_chat(messages)) > room:
        shorter = without_oldest_turn(messages)
        if shorter is None:
            break
        messages = shorter
    return messages


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs now and then, closed as `asyncio.run` closes its own."""
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
