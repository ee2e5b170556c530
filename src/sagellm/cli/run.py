"""`sage-llm run`: one prompt, one streamed answer."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from sagellm.cli.session import end_line, make_engine, read_question, show_text
from sagellm_core.command import print_quietly
from sagellm_protocol import SamplingParams, StreamEventDelta, StreamEventEnd

if TYPE_CHECKING:
    from sagellm.cli.options import SamplingFlags
    from sagellm_core import LLMEngine
    from sagellm_core.options import EngineFlags


def run_prompt(
    prompt: str | None, engine: EngineFlags, sampling: SamplingFlags, *, raw: bool, system: str | None, as_json: bool
) -> None:
    """Answer `prompt` (or standard input) and print the answer; see `sage-llm run --help`."""
    params = sampling.sampling()
    text, messages = read_question(prompt, raw=raw, system=system)
    source: dict[str, Any] = {"prompt_or_request": text} if raw else {"messages": messages}
    asyncio.run(_answer(make_engine(engine), source, params, as_json=as_json))


async def _answer(engine: LLMEngine, source: dict[str, Any], sampling: SamplingParams, *, as_json: bool) -> None:
    async with engine:
        if "messages" in source and not engine.tokenizer.has_chat_template:
            # A model without a chat template was made to continue texts, not to answer.
            source = {"prompt_or_request": "\n\n".join(message["content"] for message in source["messages"])}
        async for event in engine.stream(**source, sampling_params=sampling):
            if isinstance(event, StreamEventDelta) and not as_json and event.index == 0:
                show_text(event.chunk)
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
        print_quietly(end_line(event))
