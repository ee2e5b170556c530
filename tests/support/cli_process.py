"""Runs the command line: in this process (fast) and as a process of its own (pipes, signals, terminals)."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from waiting import PATIENCE_S

SUPPORT = Path(__file__).resolve().parent
SOURCE = SUPPORT.parents[1] / "src"
START_TIMEOUT_S = 180.0


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


class Cli:
    """`sage-llm` in this process: `cli("run", "-p", "hi")`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str, stdin: str | bytes = "") -> Outcome:
        from sagellm.cli import main

        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        self._monkeypatch.setattr(sys, "argv", ["sage-llm", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = self._capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, out, err)


def environment(home: Path, **further: str) -> dict[str, str]:
    """An environment for a process: this source tree, no configuration, no hub, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAGELLM_", "HF_", "XDG_"))}
    settings = {
        "PYTHONPATH": os.pathsep.join((str(SOURCE), str(SUPPORT))),
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "TERM": "dumb",
        "COLUMNS": "200",
    }
    return {**kept, **settings, **further}


def run_process(arguments: Sequence[str], home: Path, *, module: str = "sagellm", **options: object) -> Outcome:
    """`python -m <module> <arguments>`, to its end."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class ServerProcess:
    """A server that has said where it listens. `log` is what it wrote to stderr so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.url = ""
        self._has_url = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._has_url.wait(START_TIMEOUT_S) or not self.url:
            raise AssertionError(f"the server did not start: {''.join(self.log)}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"at (https?://[^/\s]+)", line)
            if found:
                self.url = found.group(1)
                self._has_url.set()
        self._has_url.set()

    def stop(self, signal_number: int) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(signal_number)
        status = self.process.wait(timeout=30)
        self._reader.join(timeout=5)
        return status


@contextmanager
def server(arguments: Sequence[str], home: Path, *, module: str = "sagellm") -> Iterator[ServerProcess]:
    """A server process on a free port; killed at the end if it still runs."""
    command = [sys.executable, "-m", module, *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, env=environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield ServerProcess(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait_until_idle(url: str) -> None:
    """Wait until no engine of a server has a request."""
    deadline = time.monotonic() + PATIENCE_S
    while any(engine["num_requests"] for engine in httpx.get(f"{url}/health").json()["engines"].values()):
        assert time.monotonic() < deadline, "a request is still running"
        time.sleep(0.05)
