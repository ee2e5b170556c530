"""What `run`, `chat`, `serve`, `bench` and `demo` share: the engine of the command line, and how answers are printed.

Imports next to nothing: `chat --url` and `ps` don't wait for what an engine needs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sagellm_core.command import kept_from_collector, print_quietly

if TYPE_CHECKING:
    from sagellm_core import LLMEngine, LLMEngineConfig
    from sagellm_core.options import EngineFlags
    from sagellm_protocol import StreamEventEnd


def make_engine(flags: EngineFlags, **defaults: Any) -> LLMEngine:
    """An engine, not yet started: from the flags, then `defaults`, then the user's configuration."""
    from sagellm.config import load_user_config

    options = {**defaults, **flags.options()}
    return engine_of(load_user_config().engine_config(model=flags.model, backend=flags.backend, **options))


def engine_of(config: LLMEngineConfig) -> LLMEngine:
    """An engine, not yet started, that shows how far loading has come."""
    from sagellm.cli.loading import LoadingBar

    # Imported here because it brings torch: a wrong configuration is said at once.
    with kept_from_collector():
        from sagellm_core import LLMEngine

    return LLMEngine(config, on_progress=LoadingBar())


def read_question(prompt: str | None, *, raw: bool, system: str | None) -> tuple[str, list[dict[str, Any]]]:
    """The prompt (standard input, if None) and the chat that it begins; raises `InvalidArgumentError`."""
    if raw and system is not None:
        raise _wrong("--system needs the chat template, which --raw leaves out; drop one of them")
    text = _read_stdin() if prompt is None else prompt
    if not text.strip():
        raise _wrong("the prompt is empty; give one with -p or on standard input")
    return text, [*system_messages(system), {"role": "user", "content": text}]


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print_quietly("Type the prompt and end it with Ctrl-D.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise _wrong(f"standard input is not UTF-8: byte {error.start} is wrong; convert it") from error


def _wrong(message: str) -> Exception:
    from sagellm_protocol import InvalidArgumentError

    return InvalidArgumentError(message, field="prompt")


def system_messages(system: str | None) -> list[dict[str, Any]]:
    """The system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def end_line(event: StreamEventEnd) -> str:
    """The quiet line under an engine's answer."""
    usage, metrics = event.usage, event.metrics
    return metrics_line(
        usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, metrics.ttft_ms, metrics.tpot_ms
    )


def metrics_line(num_prompt: int, num_output: int, num_cached: int, ttft_ms: float, tpot_ms: float) -> str:
    """The quiet line under an answer: its tokens and times."""
    parts = [f"{num_prompt} → {num_output} tokens", f"first token {ttft_ms:.0f} ms"]
    if tpot_ms:
        parts.append(f"then {1e3 / tpot_ms:.1f} tokens/s")
    if num_cached:
        parts.append(f"{num_cached} cached")
    return " · ".join(parts)


def show_text(text: str) -> None:
    """A piece of an answer on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
