"""Engines killed at random under streams: nothing may be lost, doubled or changed.

    python benchmarks/chaos.py [--seconds 120] [--engines 3] [--streams 16] [--every 3] [--signal KILL|STOP|both]
        [--poison 10]

First one engine alone answers every prompt: the answers that have to come out. Then the control plane runs that many
child processes, keeps that many streams going, and every few seconds a random engine gets the signal: KILL ends it,
STOP hangs it. Each stream's text and tokens are compared with the undisturbed ones, token by token; the longest pause
between two tokens of a stream is what its reader saw of it. With `--poison` so many requests come besides, spread over
the time, of which each kills whatever engine computes it: with SIGSEGV, an abort, an exit or a loop without an end, at
its first token or a later one. Ends with 1 if any other request failed, a token differs, or one of these was not
refused or took more than three engines with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sagellm_control_plane import ControlPlaneManager, EngineConfig, engine_process
from sagellm_control_plane.clients.process import ENGINE_COMMAND, ProcessEngineClient
from sagellm_control_plane.config import ControlPlaneConfig
from sagellm_control_plane.lifecycle_config import LifecycleConfig
from sagellm_core import LLMEngine
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import (
    DecodingStrategy,
    ErrorCode,
    Request,
    SageLLMError,
    SamplingParams,
    StreamEvent,
    StreamEventDelta,
)

SUBJECTS = ("a dragon", "the sea", "a lost key", "two cats", "an old clock", "the moon", "a train", "winter")
ENGINE = "engine"  # the first argument of a child that poison can kill
ENDS = ("SEGV", "ABRT", "exit", "loop")
MOST_KILLED = 3  # engines that one request may take with it


class PoisonedEngine(LLMEngine):
    """Dies of prompts that say so: `poison SEGV 3` with the fourth token. Writes down who has killed whom."""

    async def stream(  # type: ignore[override]  # requests are all that comes here
        self, request: Request, /
    ) -> AsyncGenerator[StreamEvent, None]:
        words = str(request.prompt).split()
        is_poison, num_tokens = words[0] == "poison", 0
        if request.resume_from is not None and request.resume_from.output_token_ids:
            num_tokens = len(request.resume_from.output_token_ids[0])
        async for event in super().stream(request):
            num_tokens += len(event.chunk_tokens) if isinstance(event, StreamEventDelta) else 0
            if is_poison and num_tokens > int(words[2]):
                with open(os.environ["CHAOS_KILLED"], "a", encoding="utf-8") as file:
                    file.write(f"{request.request_id} {os.getpid()}\n")
                _end_as(words[1])
            yield event


def _end_as(how: str) -> None:
    if how == "exit":
        os._exit(3)
    while how == "loop":
        pass
    os.kill(os.getpid(), getattr(signal, f"SIG{how}"))


def make_poisoned_engine(config: LLMEngineConfig) -> PoisonedEngine:
    """What the child processes run where there is poison."""
    return PoisonedEngine(config)


@dataclass(slots=True)
class Outcome:
    """What the readers of all streams saw."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    tokens: int = 0
    pauses_s: list[float] = field(default_factory=list)  # the longest of each stream
    signals: Counter[str] = field(default_factory=Counter)
    moved: int = 0  # requests that changed their engine
    struck: set[int] = field(default_factory=set)  # processes that got one
    poison: Counter[str] = field(default_factory=Counter)  # what became of such requests
    killed: Counter[int] = field(default_factory=Counter)  # engines that one took with it: how many did so

    @property
    def is_clean(self) -> bool:
        is_contained = set(self.poison) <= {ErrorCode.INTERNAL.value} and max(self.killed, default=0) <= MOST_KILLED
        return self.answered > 0 and not self.failed and not self.wrong and is_contained


def requests(model: str, num_tokens: int) -> list[Request]:
    """Greedy and seeded requests of different lengths; each is asked for again and again."""
    made = []
    for number, subject in enumerate(SUBJECTS):
        for seed, temperature in ((None, 0.0), (number, 0.9)):
            sampling = SamplingParams(
                strategy=DecodingStrategy.GREEDY if seed is None else DecodingStrategy.SAMPLING,
                temperature=temperature,
                seed=seed,
                max_tokens=num_tokens - 7 * number,
                ignore_eos=True,
            )
            made.append(
                Request(model=model, prompt=f"Tell me of {subject}. Once upon a time", sampling_params=sampling)
            )
    return made


async def undisturbed(model: str, wanted: list[Request], options: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """The answers of one engine that nobody disturbs."""
    config = EngineConfig(kind="cpu", model=model, options=options).to_llm_engine_config()
    async with LLMEngine(config) as engine:
        answers = [await engine.execute(request) for request in wanted]
    return [(answer.output_text, answer.output_tokens) for answer in answers]


async def read(
    manager: ControlPlaneManager, wanted: list[Request], right: list[Any], choices: random.Random, outcome: Outcome
) -> None:
    """One stream and the check of all that it brought."""
    number = choices.randrange(len(wanted))
    request = wanted[number].model_copy(update={"request_id": f"chaos-{choices.getrandbits(48):x}", "stream": True})
    text, tokens, longest, before = "", [], 0.0, time.monotonic()
    try:
        async for event in manager.stream_request(request):
            now = time.monotonic()
            longest, before = max(longest, now - before), now
            if event.event == "delta":
                text += event.chunk
                tokens += event.chunk_tokens
            elif event.event == "end" and event.error is not None:
                outcome.failed[event.error.message[:100]] += 1
                return
            elif event.event == "end" and (event.output_text, event.output_tokens) != (text, tokens):
                outcome.wrong += 1
                return
    except Exception as error:  # whatever it is, the reader has seen a failure
        outcome.failed[f"{type(error).__name__}: {error}"[:100]] += 1
        return
    outcome.answered += 1
    outcome.tokens += len(tokens)
    outcome.pauses_s.append(longest)
    outcome.wrong += (text, tokens) != right[number]


async def poison(manager: ControlPlaneManager, number: int, outcome: Outcome) -> None:
    """A request that kills, and what is said of it in the end."""
    prompt = f"poison {ENDS[number % len(ENDS)]} {number * 3 % 7}"
    sampling = SamplingParams(max_tokens=20, temperature=0.9, seed=number, ignore_eos=True)
    request = Request(request_id=f"poison-{number}", prompt=prompt, sampling_params=sampling, stream=True)
    try:
        async for event in manager.stream_request(request):
            if event.event == "end":
                outcome.poison["answered" if event.error is None else event.error.code.value] += 1
    except SageLLMError as error:
        outcome.poison[error.code.value] += 1


async def disturb(
    manager: ControlPlaneManager,
    signals: list[signal.Signals],
    every_s: float,
    end: float,
    choices: random.Random,
    outcome: Outcome,
) -> None:
    """Send a signal to a random running engine, again and again until `end`."""
    while time.monotonic() < end:
        await asyncio.sleep(every_s)
        running = [info for info in manager.list_engines() if info.state.value == "ready" and info.pid]
        if running:
            which = choices.choice(signals)
            pid = choices.choice(running).pid or 0
            os.kill(pid, which)
            outcome.signals[which.name] += 1
            outcome.struck.add(pid)


async def run(arguments: argparse.Namespace) -> Outcome:
    """The whole experiment."""
    wanted = requests(arguments.model, arguments.tokens)
    options = {"max_batch_size": arguments.streams, "num_threads": 1}
    right = await undisturbed(arguments.model, wanted, options)
    choices, outcome = random.Random(arguments.seed), Outcome()
    signals = {"KILL": [signal.SIGKILL], "STOP": [signal.SIGSTOP], "both": [signal.SIGKILL, signal.SIGSTOP]}
    engines = [EngineConfig(kind="cpu", model=arguments.model, options=options) for _ in range(arguments.engines)]
    # Engines that hang are found by their silence; where one hangs every three seconds, ten are too long to wait.
    # Nor is one to be given up because it was killed again before it had worked.
    lifecycle = LifecycleConfig(
        hang_timeout_s=arguments.hang_timeout,
        probe_interval_s=0.3,
        probe_timeout_s=0.4,
        max_restart_backoff_s=1.0,
        max_restarts=1000,
    )
    with tempfile.TemporaryDirectory() as folder:
        killed = Path(folder) / "killed"
        os.environ["CHAOS_KILLED"] = str(killed)
        command = (sys.executable, __file__, ENGINE) if arguments.poison else ENGINE_COMMAND
        manager = ControlPlaneManager(
            engine_configs=engines,
            config=ControlPlaneConfig(lifecycle=lifecycle),
            make_engine=lambda config: ProcessEngineClient(config, run_dir=Path(folder), command=command),
        )
        async with manager:
            end = time.monotonic() + arguments.seconds

            async def keep_reading() -> None:
                while time.monotonic() < end:
                    await read(manager, wanted, right, choices, outcome)

            chaos = asyncio.create_task(
                disturb(manager, signals[arguments.signal], arguments.every, end, choices, outcome)
            )

            async def poison_later(number: int) -> None:
                await asyncio.sleep(number * 0.8 * arguments.seconds / arguments.poison)
                await poison(manager, number, outcome)

            streams = (keep_reading() for _ in range(arguments.streams))
            await asyncio.gather(*streams, *map(poison_later, range(arguments.poison)))
            chaos.cancel()
            left = [info for info in manager.list_engines() if info.num_requests or info.num_tokens]
            if left or manager.num_waiting:
                outcome.failed[f"the ledger does not return to zero: {left}"] += 1
            outcome.moved = sum(event.kind == "moved" for event in manager.events.recent())
        if arguments.poison:
            kills = [line.split() for line in killed.read_text(encoding="utf-8").splitlines()]
            killers = Counter(killer for killer, pid in kills if int(pid) not in outcome.struck)
            outcome.killed = Counter(killers.values())
    return outcome


def show(outcome: Outcome, arguments: argparse.Namespace) -> None:
    """The table, and JSON where asked."""
    pauses = sorted(outcome.pauses_s)
    figures = {
        "signals": dict(outcome.signals),
        "answered": outcome.answered,
        "failed": dict(outcome.failed),
        "wrong": outcome.wrong,
        "tokens": outcome.tokens,
        "moved": outcome.moved,
        "poison": dict(outcome.poison),
        "requests_by_engines_killed": dict(outcome.killed),
        "pause_p50_s": statistics.median(pauses) if pauses else None,
        "pause_p99_s": pauses[int(0.99 * (len(pauses) - 1))] if pauses else None,
        "pause_max_s": pauses[-1] if pauses else None,
    }
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**vars(arguments), **figures}, indent=2, default=str), encoding="utf-8")


def main() -> None:
    """Read the flags, run, and say by the exit status whether all went well."""
    if sys.argv[1:2] == [ENGINE]:
        engine_process.main(make_poisoned_engine)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--every", type=float, default=3, help="seconds between two signals")
    parser.add_argument("--signal", choices=("KILL", "STOP", "both"), default="KILL")
    parser.add_argument("--poison", type=int, default=0, help="requests that kill their engine")
    parser.add_argument("--hang-timeout", type=float, default=1.5, help="silence until an engine is lost")
    parser.add_argument("--tokens", type=int, default=400, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    outcome = asyncio.run(run(arguments))
    show(outcome, arguments)
    sys.exit(0 if outcome.is_clean else 1)


if __name__ == "__main__":
    main()
