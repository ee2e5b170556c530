"""What `run`, `chat` and `demo` share: the engine of the command line, its flags, and how answers are printed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from sagellm.cli.loading import LoadingBar
from sagellm.config import load_user_config
from sagellm_protocol import InvalidArgumentError, Metrics, SamplingParams, Usage

if TYPE_CHECKING:
    from sagellm_core import LLMEngine


def make_engine(model: str | None, backend: str | None, **options: Any) -> LLMEngine:
    """An engine, not yet started, from flags where given and from the user's configuration where not."""
    config = load_user_config().engine_config(model=model, backend=backend, **options)
    # Imported here because it brings torch: a wrong configuration is said at once.
    with _kept_from_collector():
        from sagellm_core import LLMEngine

    return LLMEngine(config, on_progress=LoadingBar())


@contextmanager
def _kept_from_collector() -> Iterator[None]:
    """For imports: importing torch makes 160,000 objects for good, and the collector would search them again and again.

    That takes a tenth of a second of the start, a third of a second of the end, and as much of every full collection.
    """
    if "torch" in sys.modules:  # imported by whoever called us, with garbage of theirs that is not to be kept
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def sampling_from_flags(preset: str | None, given: dict[str, Any]) -> SamplingParams:
    """Sampling parameters of the flags that were given; the rest is left to the engine and the model."""
    flags = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**flags) if preset is None else SamplingParams.from_preset(preset, **flags)


def to_messages(prompt: str, system: str | None) -> list[dict[str, Any]]:
    """A chat of one user message, behind the system message if there is one."""
    if not prompt.strip():
        raise InvalidArgumentError("the prompt is empty; give one with -p or on standard input", field="prompt")
    return [*system_messages(system), {"role": "user", "content": prompt}]


def system_messages(system: str | None) -> list[dict[str, Any]]:
    """The system message, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def metrics_line(metrics: Metrics, usage: Usage) -> str:
    """The quiet line under an answer."""
    parts = [f"{usage.prompt_tokens} → {usage.completion_tokens} tokens", f"first token {metrics.ttft_ms:.0f} ms"]
    if metrics.tpot_ms:
        parts.append(f"then {1e3 / metrics.tpot_ms:.1f} tokens/s")
    if usage.cached_tokens:
        parts.append(f"{usage.cached_tokens} cached")
    return " · ".join(parts)


def print_quietly(text: str) -> None:
    """A remark on stderr, dimmed, so that pipes get the answer alone."""
    typer.secho(text, err=True, dim=True)
