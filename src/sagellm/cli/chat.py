"""`sage-llm chat`: a conversation in the terminal; Ctrl-C ends one answer, Ctrl-D the conversation.

Lines are read in the main thread while no event loop runs, so that line editing and Ctrl-C work as in a shell.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sagellm.cli.session import make_engine, metrics_line, print_quietly, sampling_from_flags, system_messages
from sagellm_protocol import SageLLMError, SamplingParams, StreamEventDelta, StreamEventEnd

if TYPE_CHECKING:
    from sagellm_core import LLMEngine

_HELP = "/clear forgets the conversation, /help shows this, /exit or Ctrl-D leaves, Ctrl-C ends an answer."


def chat_loop(
    model: str | None,
    backend: str | None,
    options: dict[str, Any],
    preset: str | None,
    given: dict[str, Any],
    *,
    system: str | None,
) -> None:
    """Read, answer, repeat; see `sage-llm chat --help`."""
    sampling = sampling_from_flags(preset, given)
    engine = make_engine(model, backend, **options)
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and history
    with _event_loop() as loop:
        loop.run_until_complete(engine.start())
        try:
            print_quietly(f"Chat with {engine.config.model_path}. {_HELP}")
            _converse(loop, engine, sampling, system)
        finally:
            loop.run_until_complete(engine.stop())


def _converse(loop: asyncio.AbstractEventLoop, engine: LLMEngine, sampling: SamplingParams, system: str | None) -> None:
    messages = system_messages(system)
    while (text := _read_line()) is not None:
        command = text.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/help":
            print_quietly(_HELP)
        elif command == "/clear":
            messages = system_messages(system)
            print_quietly("The conversation starts anew.")
        elif command:
            messages.append({"role": "user", "content": text})
            answer = loop.run_until_complete(_answer_until_interrupt(engine, messages, sampling))
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()  # nothing was said: as if it had not been asked


def _read_line() -> str | None:
    """The user's next line; None at the end. Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()


async def _answer_until_interrupt(engine: LLMEngine, messages: list[dict[str, Any]], sampling: SamplingParams) -> str:
    """Print one answer and return what was said of it: until its end, an error or Ctrl-C."""
    said: list[str] = []
    answering = asyncio.ensure_future(_answer(engine, messages, sampling, said))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        await answering
    except asyncio.CancelledError:
        print(flush=True)
        print_quietly("(stopped)")
    except SageLLMError as error:
        print(flush=True)
        print_quietly(f"error [{error.code}]: {error.message}")
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return "".join(said)


async def _answer(engine: LLMEngine, messages: list[dict[str, Any]], sampling: SamplingParams, said: list[str]) -> None:
    async with aclosing(engine.stream(messages=fit(engine, messages), sampling_params=sampling)) as events:
        async for event in events:
            if isinstance(event, StreamEventDelta) and event.index == 0:
                said.append(event.chunk)
                sys.stdout.write(event.chunk)
                sys.stdout.flush()
            elif isinstance(event, StreamEventEnd):
                if event.error is not None:
                    raise event.error.to_exception()
                print(flush=True)
                print_quietly(metrics_line(event.metrics, event.usage))


def fit(engine: LLMEngine, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest messages that leave half of the model's length for the answer; the system message stays."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    room = engine.config.max_model_len // 2
    while len(turns) > 2 and len(engine.tokenizer.encode_chat([*system, *turns])) > room:
        turns = turns[2:]
    return [*system, *turns]


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
