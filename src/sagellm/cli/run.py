"""`sage-llm run`: one prompt, one streamed answer."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from sagellm.cli.session import make_engine, metrics_line, print_quietly, sampling_from_flags, to_messages
from sagellm_protocol import InvalidArgumentError, SamplingParams, StreamEventDelta, StreamEventEnd

if TYPE_CHECKING:
    from sagellm_core import LLMEngine


def run_prompt(
    prompt: str | None,
    model: str | None,
    backend: str | None,
    options: dict[str, Any],
    preset: str | None,
    given: dict[str, Any],
    *,
    raw: bool,
    system: str | None,
    as_json: bool,
) -> None:
    """Answer `prompt` (or standard input) and print the answer; see `sage-llm run --help`."""
    sampling = sampling_from_flags(preset, given)
    if raw and system is not None:
        raise InvalidArgumentError("--system needs the chat template, which --raw leaves out; drop one of them")
    text = _read_stdin() if prompt is None else prompt
    messages = to_messages(text, system)
    engine = make_engine(model, backend, **options)
    source: dict[str, Any] = {"prompt_or_request": text} if raw else {"messages": messages}
    asyncio.run(_answer(engine, source, sampling, as_json=as_json))


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print_quietly("Type the prompt and end it with Ctrl-D.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"standard input is not UTF-8: byte {error.start} is wrong; convert it") from error


async def _answer(engine: LLMEngine, source: dict[str, Any], sampling: SamplingParams, *, as_json: bool) -> None:
    async with engine:
        if "messages" in source and not engine.tokenizer.has_chat_template:
            # A model without a chat template was made to continue texts, not to answer.
            source = {"prompt_or_request": "\n\n".join(message["content"] for message in source["messages"])}
        async for event in engine.stream(**source, sampling_params=sampling):
            if isinstance(event, StreamEventDelta) and not as_json and event.index == 0:
                sys.stdout.write(event.chunk)
                sys.stdout.flush()
            elif isinstance(event, StreamEventEnd):
                _print_end(event, as_json=as_json)


def _print_end(event: StreamEventEnd, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(event.to_response().model_dump(mode="json"), ensure_ascii=False, indent=2))
    else:
        print(flush=True)
    if event.error is not None:
        raise event.error.to_exception()
    if not as_json:
        print_quietly(metrics_line(event.metrics, event.usage))
