"""The engine beside llama.cpp, OpenVINO GenAI, vLLM and transformers: same weights, same work, interleaved runs.

    python benchmarks/compare.py --model FOLDER --peers FOLDER [--weights 16-bit,int8,int4] [--rounds 3] [--json FILE]

`--peers` holds one virtual environment a peer: `llama_cpp`, `openvino`, `vllm`, `transformers` (docs/benchmarks.md has
the commands that make them); a peer without one, or one that fails, is skipped with the reason. Every contender is a
process of its own that keeps its model over all rounds and is stopped (SIGSTOP) while another one runs. In a round each
contender does each row once, and neighbours in time do the same row; medians over the rounds count, and the ratio to
a peer is the median of the rounds' ratios. Checkpoints are converted to the peers' formats once, into `--work`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sagellm_benchmark.requests import random_prompts
from sagellm_benchmark.timing import TokenTimes, decode_rate, output_rate, prefill_rate

ENGINE = "sagellm"
PEERS = ("llama_cpp", "openvino", "vllm", "transformers")
WEIGHTS = ("16-bit", "int8", "int4")
WORKER = Path(__file__).parent / "peers" / "worker.py"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a batch and the rate that is read from it."""

    title: str
    requests: int
    input_len: int
    output_len: int
    rate: str  # prefill, decode or output

    def rate_of(self, times: TokenTimes) -> float:
        """Tokens a second."""
        if self.rate == "prefill":
            return prefill_rate(times, self.input_len)
        if self.rate == "output":
            return output_rate(times)
        decoded = decode_rate(times)
        assert decoded is not None, "requests of one length decode together"
        return decoded


ROWS = {
    "decode-1": Row("decode, 1 request", 1, 16, 64, "decode"),
    "prefill": Row("prefill of 1,024 tokens", 1, 1024, 1, "prefill"),
    "decode-8": Row("decode, 8 requests", 8, 16, 64, "decode"),
    "decode-32": Row("decode, 32 requests", 32, 16, 64, "decode"),
    "end-to-end-8": Row("8 requests end to end, 128 → 64", 8, 128, 64, "output"),
    "end-to-end-32": Row("32 requests end to end, 128 → 64", 32, 128, 64, "output"),
}
# Minutes a run for nothing that the batch of eight does not say.
_TOO_SLOW = {"transformers": {"decode-32", "end-to-end-32"}}
_WARMUP_TOKENS = 8
_WARMUP_VOCABULARY = 1000  # less than any model's


class Contender:
    """A worker process: calls it, and keeps it stopped in between."""

    def __init__(self, name: str, python: Path, log: Path) -> None:
        self.name = name
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, WORKER, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # a process group of its own: stopped and ended with its children
        )

    def call(self, name: str, **arguments: Any) -> Any:
        """The result of a call; RuntimeError where the worker reports an error or has died."""
        stdin, stdout = self._pipes()
        self._signal(signal.SIGCONT)
        try:
            stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self.name} ended; see {self._log.name}")
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']} (log: {self._log.name})")
        return answer["result"]

    def close(self) -> None:
        """End the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (*self._pipes(), self._log):
            with contextlib.suppress(OSError):
                stream.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@dataclass
class Results:
    """Rates by weights, row and contender, one a round; who was skipped, and why."""

    rates: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, weights: str, row: str, name: str, rate: float) -> None:
        """One run."""
        self.rates.setdefault(weights, {}).setdefault(row, {}).setdefault(name, []).append(rate)

    def ratio(self, weights: str, row: str, name: str) -> float | None:
        """The engine's rate over a contender's: the median over the rounds."""
        by_name = self.rates[weights][row]
        pairs = zip(by_name.get(ENGINE, []), by_name.get(name, []), strict=False)
        ratios = [ours / theirs for ours, theirs in pairs]
        return statistics.median(ratios) if ratios else None


def main() -> None:
    """Run what was asked for, print the table, write the JSON."""
    arguments = parse_arguments()
    # Stopped processes would outlive an end by `timeout` or by a job's limit: leave through the `finally` below.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = Results()
    console = Console()
    with Progress(console=Console(stderr=True)) as progress:
        for weights in arguments.weights:
            compare(weights, arguments, results, progress)
            write_json(arguments, results)
    for weights in arguments.weights:
        console.print(make_table(weights, results))
        for name, reason in results.skipped.get(weights, {}).items():
            console.print(f"skipped {name}: {reason}", highlight=False, markup=False)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a folder in the format of Hugging Face")
    parser.add_argument("--peers", type=Path, default=None, help="folder with a virtual environment for each peer")
    parser.add_argument("--work", type=Path, default=Path("build/compare"), help="converted checkpoints and logs")
    parser.add_argument("--only", default=",".join((ENGINE, *PEERS)), help="contenders, separated by commas")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="separated by commas")
    parser.add_argument("--rows", default=",".join(ROWS), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lock", type=Path, default=None, help="file to lock while a contender runs (shared machines)")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    for name, known in (("only", (ENGINE, *PEERS)), ("weights", WEIGHTS), ("rows", ROWS)):
        chosen = getattr(arguments, name).split(",")
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"--{name} knows {', '.join(known)}, not {', '.join(unknown)}")
        setattr(arguments, name, chosen)
    return arguments


def compare(weights: str, arguments: argparse.Namespace, results: Results, progress: Progress) -> None:
    """All rounds with one kind of weights. Only its contenders live meanwhile: models of several kinds are many GB."""
    contenders: list[Contender] = []
    try:
        for name in arguments.only:
            progress.console.print(f"{weights}: loading {name}", highlight=False)
            contender = start(name, weights, arguments, results)
            if contender is not None:
                contenders.append(contender)
        task = progress.add_task(weights, total=arguments.rounds * len(arguments.rows) * len(contenders))
        for number in range(arguments.rounds):
            for row in arguments.rows:
                # Who goes first changes: a warm or throttled machine favours nobody.
                turn = number % len(contenders) if contenders else 0
                for contender in (*contenders[turn:], *contenders[:turn]):
                    run(contender, weights, row, number, arguments, results, progress.console)
                    progress.advance(task)
                write_json(arguments, results)
    finally:
        for contender in contenders:
            contender.close()


def start(name: str, weights: str, arguments: argparse.Namespace, results: Results) -> Contender | None:
    """A contender with its model loaded and warmed up; None, with the reason noted, where that fails."""

    def skip(reason: str) -> None:
        results.skipped.setdefault(weights, {})[name] = reason

    python = Path(sys.executable)
    if name != ENGINE:
        if arguments.peers is None:
            return skip("no --peers folder given")
        python = arguments.peers / name / "bin" / "python"
        if not python.exists():
            return skip(f"not installed: there is no {python}")
    rows = [ROWS[row] for row in rows_of(name, arguments)]
    if not rows:
        return skip("runs none of these rows")
    contender = Contender(name, python, arguments.work / f"{name}-{weights}.log")
    try:
        with locked(arguments.lock, fcntl.LOCK_SH):
            folder = str(arguments.work)
            checkpoint = contender.call("prepare", model=str(arguments.model), weights=weights, folder=folder)
            description = contender.call(
                "load",
                checkpoint=checkpoint,
                weights=weights,
                threads=arguments.threads,
                max_requests=max(row.requests for row in rows),
                max_len=max(row.input_len + row.output_len for row in rows),
            )
            for row in rows:  # the shapes of every row once: some compile kernels or choose them at first sight
                prompts = random_prompts(row.requests, row.input_len, _WARMUP_VOCABULARY, seed=-1)
                contender.call("generate", prompts=prompts, output_len=min(row.output_len, _WARMUP_TOKENS))
    except RuntimeError as error:
        contender.close()
        return skip(str(error))
    results.described.setdefault(weights, {})[name] = description
    return contender


def rows_of(name: str, arguments: argparse.Namespace) -> list[str]:
    """What a contender is asked to do."""
    return [row for row in arguments.rows if row not in _TOO_SLOW.get(name, ())]


def run(
    contender: Contender,
    weights: str,
    row: str,
    number: int,
    arguments: argparse.Namespace,
    results: Results,
    console: Console,
) -> None:
    """One row once. A failure is reported; the others go on."""
    if row not in rows_of(contender.name, arguments):
        return
    spec = ROWS[row]
    vocab_size = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    prompts = random_prompts(spec.requests, spec.input_len, vocab_size, arguments.seed + number)
    try:
        with locked(arguments.lock, fcntl.LOCK_EX):
            times = contender.call("generate", prompts=prompts, output_len=spec.output_len)
    except RuntimeError as error:
        console.print(f"{contender.name}, {weights}, {row}: {error}", highlight=False, markup=False)
        return
    rate = spec.rate_of(times)
    results.add(weights, row, contender.name, rate)
    console.print(f"{weights:7} round {number + 1} {row:14} {contender.name:13} {rate:8.1f} tok/s", highlight=False)


@contextlib.contextmanager
def locked(file: Path | None, kind: int) -> Iterator[None]:
    """Hold a lock on a file, if one is given."""
    if file is None:
        yield
        return
    with file.open("a") as handle:
        fcntl.flock(handle, kind)
        yield


def make_table(weights: str, results: Results) -> Table:
    """Medians in tokens a second, and the engine's ratio to each peer and to the best."""
    names = [name for name in (ENGINE, *PEERS) if any(name in row for row in results.rates.get(weights, {}).values())]
    table = Table("tok/s", *names, "best peer", "ratio to it", title=f"{weights} weights")
    for row, by_name in results.rates.get(weights, {}).items():
        medians = {name: statistics.median(rates) for name, rates in by_name.items()}
        peers = [name for name in medians if name != ENGINE]
        best = max(peers, key=lambda name: medians[name], default=None)
        ratio = None if best is None else results.ratio(weights, row, best)
        cells = [f"{medians[name]:.1f}" if name in medians else "-" for name in names]
        table.add_row(ROWS[row].title, *cells, best or "-", "-" if ratio is None else f"{ratio:.2f}")
    return table


def write_json(arguments: argparse.Namespace, results: Results) -> None:
    """Everything measured so far."""
    if arguments.json is None:
        return
    data = {
        "model": str(arguments.model.name),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": arguments.threads,
        "contenders": results.described,
        "skipped": results.skipped,
        "tokens_per_second": results.rates,
        "medians": {
            weights: {
                row: {name: statistics.median(rates) for name, rates in by_name.items()}
                for row, by_name in rows.items()
            }
            for weights, rows in results.rates.items()
        },
        "ratios": {
            weights: {
                row: {name: results.ratio(weights, row, name) for name in by_name} for row, by_name in rows.items()
            }
            for weights, rows in results.rates.items()
        },
    }
    arguments.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
