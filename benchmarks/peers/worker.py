"""One contender of `compare.py` as a process: `python worker.py PEER`, JSON lines in and out.

Runs in the contender's own virtual environment, so it imports nothing of ours: only the standard library and the
peer's module beside it. Requests are {"call": NAME, "arguments": {...}}, answers {"result": ...} or {"error": TEXT}.
A peer's module has

    prepare(model, weights, folder) -> str          # the checkpoint converted to its own format, made once
    Peer(checkpoint, weights, threads, max_requests, max_len)
    Peer.describe() -> dict                          # versions and settings, for the record
    Peer.generate(prompts, output_len) -> [[s]]      # greedy; when each token of each prompt arrived

with `weights` one of "16-bit", "int8", "int4".
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any


class Worker:
    """The calls that `compare.py` makes."""

    def __init__(self, peer: str) -> None:
        self.module = importlib.import_module(f"{peer}_peer")
        self.peer: Any = None

    def prepare(self, **arguments: Any) -> str:
        """See `prepare` of the peer."""
        return str(self.module.prepare(**arguments))

    def load(self, **arguments: Any) -> Any:
        """Load the model; returns the peer's description of itself."""
        self.peer = self.module.Peer(**arguments)
        return self.peer.describe()

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[float]]:
        """See `Peer.generate`."""
        times = self.peer.generate(prompts, output_len)
        if any(len(arrivals) != output_len for arrivals in times):
            raise RuntimeError(f"{output_len} tokens asked for, got {[len(arrivals) for arrivals in times]}")
        return times


def _end_with_parent() -> None:
    """On Linux: be killed when the comparison is, also while stopped."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    """Answer until standard input ends."""
    _end_with_parent()
    # Libraries print what they like: standard output becomes standard error for everybody but us.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(sys.argv[1])
            answer = {"result": getattr(worker, request["call"])(**request["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
