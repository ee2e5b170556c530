"""What the subcommands of `sage-llm` take besides the options of every command (`sagellm_core.options`)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sagellm_benchmark import Load
    from sagellm_protocol import SamplingParams

System = Annotated[str | None, typer.Option(help="System message for chat models.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Runs = Annotated[int, typer.Option(help="Batches that count.", min=1)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results into this file.")]


def complete_preset(incomplete: str) -> list[str]:
    """The names of the presets."""
    return [name for name in ("deterministic", "precise", "balanced", "creative") if name.startswith(incomplete)]


def complete_strategy(incomplete: str) -> list[str]:
    """The names of the decoding strategies."""
    return [name for name in ("greedy", "sampling", "beam_search", "contrastive") if name.startswith(incomplete)]


def complete_server(incomplete: str) -> list[str]:
    """The names of the servers that run."""
    from sagellm_core.server_registry import list_servers

    return [server.name for server in list_servers() if server.name.startswith(incomplete)]


@dataclass(frozen=True)
class SamplingFlags:
    """How to choose tokens; None leaves it to the preset, the engine and the model, in this order."""

    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")] = None
    preset: Annotated[
        str | None,
        typer.Option(help="deterministic, precise, balanced or creative.", autocompletion=complete_preset),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None
    top_p: Annotated[float | None, typer.Option(help="Nucleus: the smallest set of tokens of this probability.")] = None
    top_k: Annotated[int | None, typer.Option(help="Only the k most probable tokens; 0 is off.")] = None
    min_p: Annotated[float | None, typer.Option(help="Only tokens this probable relative to the best.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages what was said.")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="Above 0 discourages what was said.")] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="Above 0: the more often it was said.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")] = None
    strategy: Annotated[
        str | None,
        typer.Option(help="greedy, sampling, beam_search or contrastive.", autocompletion=complete_strategy),
    ] = None
    num_beams: Annotated[int | None, typer.Option(help="More than 1 is beam search.")] = None

    def given(self) -> dict[str, Any]:
        """The sampling parameters among the flags, where given."""
        names = [field.name for field in fields(self) if field.name != "preset"]
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, [])}

    def sampling(self) -> SamplingParams:
        """The parameters, preset included; raises `InvalidArgumentError`."""
        from sagellm_protocol import SamplingParams

        given = self.given()
        return SamplingParams(**given) if self.preset is None else SamplingParams.from_preset(self.preset, **given)

    def body(self) -> dict[str, Any]:
        """The same as fields of an API's body, unchecked where there is no preset: the server checks."""
        if self.preset is None:
            return self.given()
        return {name: value for name, value in self.sampling().given().items() if value is not None}


@dataclass(frozen=True)
class RemoteFlags:
    """Another process that answers, instead of an engine in this one."""

    url: Annotated[
        str | None,
        typer.Option(help="Ask the OpenAI-compatible server at this address, such as http://127.0.0.1:8000."),
    ] = None
    api_key: Annotated[str | None, typer.Option(help="Of that server, if it wants one.", envvar="SAGELLM_API_KEY")] = (
        None
    )


@dataclass(frozen=True)
class LoadFlags:
    """The requests of a benchmark."""

    input_len: Annotated[int, typer.Option(help="Tokens of each prompt, random ones.", min=1)] = 128
    output_len: Annotated[int, typer.Option(help="Tokens of each answer, exactly.", min=1)] = 64
    warmup: Annotated[int, typer.Option(help="Batches before those.", min=0)] = 1
    seed: Annotated[int, typer.Option("--seed", help="Of the random prompts.")] = 0

    def load(self, num_requests: int, concurrency: int, runs: int) -> Load:
        """What the benchmark runs: `runs` batches of `num_requests`, `concurrency` at a time."""
        from sagellm_benchmark import Load

        return Load(self.input_len, self.output_len, num_requests, concurrency, runs, self.warmup, self.seed)
