"""A whole run of `sage-llm bench serve`: ask what the server has, make the requests, send them, count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from sagellm_benchmark.serve.arrivals import random_times, recorded_times
from sagellm_benchmark.serve.dialects import Dialect, EndpointName, error_of
from sagellm_benchmark.serve.drive import Outcome, Run, drive
from sagellm_benchmark.serve.http import HttpClient
from sagellm_benchmark.serve.prompts import (
    LoadRequest,
    RandomLengths,
    file_requests,
    fit_into,
    random_requests,
    trace_requests,
)
from sagellm_benchmark.serve.report import Objectives, describe, each_request
from sagellm_benchmark.serve.vocabulary import Vocabulary, learn_vocabulary
from sagellm_benchmark.traces import read_trace
from sagellm_protocol import Error, ErrorCode, InvalidArgumentError, NotFoundError, UnavailableError

DatasetName = Literal["random", "trace", "file"]

_WARMUP_LEN = 16  # tokens of a warm-up prompt where nothing says how long prompts are
_CODES = {401: "unauthenticated", 403: "permission_denied", 404: "not_found", 429: "resource_exhausted"}


@dataclass(frozen=True)
class ServeLoad:
    """What is asked of which server.

    Args:
        url: with or without `/v1`.
        model: None takes the server's first.
        rate: requests a second; None keeps a trace's own times, and is all at once for what has none.
        max_concurrency: requests on their way at a time; None is no bound.
        path: of the trace or file.
        length_scale: times which a trace's lengths are taken.
        speed: times as fast as the trace.
        objectives_to_server: whether requests carry the objectives in the headers that our gateway knows.
        warmup: requests before those that count, one after another.
        extra: further fields of every body.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    endpoint: EndpointName = "chat"
    dataset: DatasetName = "random"
    path: Path | None = None
    num_prompts: int = 100
    lengths: RandomLengths = field(default_factory=RandomLengths)
    length_scale: float = 1.0
    rate: float | None = None
    burstiness: float = 1.0
    speed: float = 1.0
    max_concurrency: int | None = None
    objectives: Objectives = field(default_factory=Objectives)
    objectives_to_server: bool = False
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    warmup: int = 1
    timeout_s: float = 600.0
    verify_tls: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("endpoint", self.endpoint, get_args(EndpointName)),
            ("dataset", self.dataset, get_args(DatasetName)),
        ):
            if value not in known:
                raise InvalidArgumentError(f"{name} is {value!r}; choose {' or '.join(known)}", field=name)
        if (self.dataset == "random") != (self.path is None):
            wrong = "takes no file; leave it out" if self.path is not None else "is read from a file; name it"
            raise InvalidArgumentError(f"the dataset {self.dataset} {wrong}", field="dataset_path")
        if not 0 < self.length_scale <= 1000:
            raise InvalidArgumentError(f"length_scale must be above 0, got {self.length_scale:g}", field="length_scale")
        if self.objectives_to_server and not self.objectives.is_any:
            raise InvalidArgumentError("there are no objectives to send; give one", field="objectives")

    def headers(self) -> dict[str, str]:
        """Of every call."""
        headers = {"User-Agent": "sage-llm bench"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        if self.objectives_to_server:
            wishes = {"ttft": self.objectives.ttft_ms, "tpot": self.objectives.tpot_ms}
            headers |= {f"x-slo-{name}-ms": f"{value:g}" for name, value in wishes.items() if value is not None}
        return headers


async def run_serve_benchmark(
    load: ServeLoad,
    *,
    on_plan: Callable[[int], None] = lambda _: None,
    on_end: Callable[[Outcome], None] = lambda _: None,
    detailed: bool = False,
) -> dict[str, Any]:
    """Measure; `on_plan` hears how many requests will be sent, `on_end` of each that has ended.

    Returns plain JSON values, each request's with `detailed`.

    Raises:
        InvalidArgumentError: the load is impossible.
        UnavailableError, UnauthenticatedError, NotFoundError: the server does not answer the warm-up.
    """
    client = HttpClient(load.url.rstrip("/").removesuffix("/v1"), headers=load.headers(), verify=load.verify_tls)
    try:
        model, max_model_len = await _find_model(client, load)
        dialect = Dialect(load.endpoint, model, load.ignore_eos, load.extra)
        vocabulary = Vocabulary() if load.dataset == "file" else await learn_vocabulary(client, model)
        requests, num_cut = fit_into(_requests(load, dialect, vocabulary), max_model_len)
        requests, times = _timed(load, requests)
        on_plan(len(requests))
        await _warm_up(client, dialect, requests[0], vocabulary, load)
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        run = await drive(
            client,
            dialect,
            requests,
            times,
            max_concurrency=load.max_concurrency,
            timeout_s=load.timeout_s,
            on_end=on_end,
        )
    except OSError as error:
        raise UnavailableError(f"no server answers at {load.url}: {error}; is it running?") from error
    finally:
        client.close()
    return _result(load, dialect, vocabulary, run, num_cut, date, detailed)


def _result(
    load: ServeLoad, dialect: Dialect, vocabulary: Vocabulary, run: Run, num_cut: int, date: str, detailed: bool
) -> dict[str, Any]:
    return {
        "benchmark": "serve",
        "date": date,
        "url": load.url,
        "model": dialect.model,
        "load": {
            "endpoint": load.endpoint,
            "dataset": load.dataset,
            "path": None if load.path is None else str(load.path),
            "num_prompts": len(run.outcomes),
            "num_cut_to_context": num_cut,
            "input_len": load.lengths.input_len if load.dataset == "random" else None,
            "output_len": load.lengths.output_len if load.dataset == "random" else None,
            "lengths_are_exact": dialect.takes_tokens and vocabulary.is_exact,
            "length_scale": load.length_scale,
            "rate": load.rate,
            "burstiness": load.burstiness,
            "speed": load.speed,
            "max_concurrency": load.max_concurrency,
            "ignore_eos": load.ignore_eos,
            "seed": load.seed,
        },
        **describe(run, load.objectives),
        **({"requests": each_request(run)} if detailed else {}),
    }


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []


async def _find_model(client: HttpClient, load: ServeLoad) -> tuple[str, int | None]:
    """The model to ask for, and its context in tokens where the server says it."""
    async with client.call("GET", "/v1/models") as answer:
        status, body = answer.status, await answer.read()
    if status != 200:
        if load.model is not None and status in (404, 405):  # not every server has the list
            return load.model, None
        raise _refusal(status, body, load)
    try:
        cards = msgspec.json.decode(body, type=_Cards).data
    except msgspec.MsgspecError as error:
        raise UnavailableError(f"{load.url} does not speak OpenAI's API ({error}); check it") from error
    if load.model is None and not cards:
        raise NotFoundError(f"{load.url} has no model ready; name one", field="model")
    name = cards[0].id if load.model is None else load.model
    return name, next((card.max_model_len for card in cards if card.id == name), None)


def _requests(load: ServeLoad, dialect: Dialect, vocabulary: Vocabulary) -> Sequence[LoadRequest]:
    takes_tokens = dialect.takes_tokens
    if load.dataset == "random":
        return random_requests(load.num_prompts, load.lengths, vocabulary, takes_tokens=takes_tokens, seed=load.seed)
    assert load.path is not None
    if load.dataset == "file":
        return file_requests(load.path, load.num_prompts, load.lengths.output_len)
    trace = [entry.scaled(load.length_scale) for entry in read_trace(load.path, load.num_prompts)]
    return trace_requests(trace, vocabulary, takes_tokens=takes_tokens, seed=load.seed)


def _timed(load: ServeLoad, requests: Sequence[LoadRequest]) -> tuple[list[LoadRequest], list[float]]:
    """The requests in the order of their times."""
    if load.rate is not None or any(request.at_s is None for request in requests):
        rate = float("inf") if load.rate is None else load.rate
        return list(requests), random_times(len(requests), rate, burstiness=load.burstiness, seed=load.seed)
    ordered = sorted(requests, key=lambda request: request.at_s or 0.0)
    return ordered, recorded_times([request.at_s for request in ordered], speed=load.speed)


async def _warm_up(
    client: HttpClient, dialect: Dialect, first: LoadRequest, vocabulary: Vocabulary, load: ServeLoad
) -> None:
    """Requests that don't count, with prompts of their own; the first that fails ends the run, with its error."""
    lengths = RandomLengths(first.input_len or _WARMUP_LEN, first.output_len)
    takes_tokens = dialect.takes_tokens
    for request in random_requests(load.warmup, lengths, vocabulary, takes_tokens=takes_tokens, seed=load.seed + 1):
        outcome = (await drive(client, dialect, [request], [0.0], timeout_s=load.timeout_s)).outcomes[0]
        if outcome.error is not None:
            status = int(outcome.error.split()[1]) if outcome.error.startswith("status ") else 503
            message = f"the first request to {load.url} failed, {outcome.error}: {outcome.message}"
            raise _error(status, f"{message}; nothing was measured")


def _refusal(status: int, body: bytes, load: ServeLoad) -> Exception:
    _, message = error_of(body)
    return _error(status, f"{load.url} answered with status {status}: {message}")


def _error(status: int, message: str) -> Exception:
    code = _CODES.get(status, "invalid_argument" if 400 <= status < 500 else "unavailable")
    return Error(code=ErrorCode(code), message=message).to_exception()
