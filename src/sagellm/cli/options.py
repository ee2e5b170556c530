"""What the subcommands of `sage-llm` take besides the options of every command (`sagellm_core.options`)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sagellm_benchmark import Load
    from sagellm_benchmark.serve.benchmark import ServeLoad
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

    @property
    def is_wanted(self) -> bool:
        """Whether a server is to answer. Raises `InvalidArgumentError` for a key of none."""
        # One from the environment lies there for whichever command has use for it.
        if self.url is None and self.api_key not in (None, os.environ.get("SAGELLM_API_KEY")):
            from sagellm.cli.server_client import make_error

            raise make_error("invalid_argument", "--api-key is for the server of --url; give that too")
        return self.url is not None


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


def complete_dataset(incomplete: str) -> list[str]:
    """The kinds of datasets."""
    return [name for name in ("random", "trace", "file") if name.startswith(incomplete)]


def complete_endpoint(incomplete: str) -> list[str]:
    """The endpoints that are measured."""
    return [name for name in ("chat", "completions") if name.startswith(incomplete)]


@dataclass(frozen=True)
class ServeLoadFlags:
    """The load of `bench serve`: which server, what is asked of it, and when."""

    url: Annotated[str, typer.Option("--url", "--base-url", help="Of a server with OpenAI's API.")] = (
        "http://127.0.0.1:8000"
    )
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the server's first.")] = None
    api_key: Annotated[str | None, typer.Option(help="Of that server.", envvar="SAGELLM_API_KEY")] = None
    endpoint: Annotated[str, typer.Option(help="chat or completions.", autocompletion=complete_endpoint)] = "chat"
    dataset: Annotated[str, typer.Option(help="random, trace or file.", autocompletion=complete_dataset)] = "random"
    dataset_path: Annotated[
        Path | None, typer.Option(help="A trace of Mooncake or Azure, or JSON lines with prompt or messages.")
    ] = None
    num_prompts: Annotated[int, typer.Option(help="Requests to send.", min=1)] = 100
    input_len: Annotated[int, typer.Option(help="Tokens of a random prompt.", min=1)] = 128
    output_len: Annotated[int, typer.Option(help="Tokens of an answer; a file's lines may differ.", min=1)] = 64
    length_spread: Annotated[float, typer.Option(help="Random lengths are even in ± this share.")] = 0.0
    prefix_len: Annotated[int, typer.Option(help="First tokens that all random prompts share.", min=0)] = 0
    length_scale: Annotated[float, typer.Option(help="Times which the lengths of a trace are taken.")] = 1.0
    request_rate: Annotated[
        float | None, typer.Option(help="Requests a second at random; inf is all at once. Default: the trace's times.")
    ] = None
    burstiness: Annotated[float, typer.Option(help="1 is a Poisson process, below 1 comes in bursts.")] = 1.0
    speed: Annotated[float, typer.Option(help="Times as fast as the trace.")] = 1.0
    max_concurrency: Annotated[int | None, typer.Option(help="Requests on their way at a time.", min=1)] = None
    slo_ttft: Annotated[float | None, typer.Option(help="Goodput: first token within so many ms.")] = None
    slo_tpot: Annotated[float | None, typer.Option(help="Goodput: ms for each further token.")] = None
    slo_latency: Annotated[float | None, typer.Option(help="Goodput: whole answer within so many ms.")] = None
    slo_headers: Annotated[bool, typer.Option("--slo-headers", help="Tell the server these objectives.")] = False
    ignore_eos: Annotated[
        bool, typer.Option(help="Answers of exactly the wanted length; not every server knows the field.")
    ] = True
    extra_body: Annotated[str | None, typer.Option(help="Further fields of every body, a JSON object.")] = None
    warmup: Annotated[int, typer.Option(help="Requests before those that count.", min=0)] = 1
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.", min=0.001)] = 600.0
    verify_tls: Annotated[bool, typer.Option(help="Refuse certificates that are not valid.")] = True
    seed: Annotated[int, typer.Option("--seed", help="Of prompts, lengths and times.")] = 0

    def load(self) -> ServeLoad:
        """What the benchmark runs; raises `InvalidArgumentError`."""
        from sagellm_benchmark.serve.benchmark import ServeLoad
        from sagellm_benchmark.serve.prompts import RandomLengths
        from sagellm_benchmark.serve.report import Objectives

        return ServeLoad(
            url=self.url,
            model=self.model,
            api_key=self.api_key,
            endpoint=self.endpoint,  # type: ignore[arg-type]  # checked there
            dataset=self.dataset,  # type: ignore[arg-type]
            path=self.dataset_path,
            num_prompts=self.num_prompts,
            lengths=RandomLengths(self.input_len, self.output_len, self.length_spread, self.prefix_len),
            length_scale=self.length_scale,
            rate=self.request_rate,
            burstiness=self.burstiness,
            speed=self.speed,
            max_concurrency=self.max_concurrency,
            objectives=Objectives(self.slo_ttft, self.slo_tpot, self.slo_latency),
            objectives_to_server=self.slo_headers,
            ignore_eos=self.ignore_eos,
            extra=self._extra(),
            warmup=self.warmup,
            timeout_s=self.timeout,
            verify_tls=self.verify_tls,
            seed=self.seed,
        )

    def _extra(self) -> dict[str, Any]:
        from sagellm_protocol import InvalidArgumentError

        try:
            value = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise InvalidArgumentError(f"--extra-body is no JSON: {error}; correct it", field="extra_body") from error
        if not isinstance(value, dict):
            raise InvalidArgumentError("--extra-body must be a JSON object", field="extra_body")
        return value
