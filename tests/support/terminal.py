"""Runs the command line in a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

from cli_process import environment


class Terminal:
    """`sage-llm` in a terminal of its own."""

    def __init__(self, arguments: list[str], home: Path, **variables: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sagellm", *arguments],
            env=environment(home, **variables),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, words: str, *, timeout_s: float = 90.0) -> str:
        """Read until `words` have come; returns what came before them and leaves what came after."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited for {words!r}, got {self.text!r}"
            self.text += os.read(self._master, 4096).decode(errors="replace")
        before, _, self.text = self.text.partition(words)
        return before

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_prompt(self) -> None:
        """Press Ctrl-C until a new prompt comes: a key between readline's prompt and its first read is lost."""
        for _ in range(30):
            self.send("\x03")
            ready, _, _ = select.select([self._master], [], [], 1.0)
            if ready:
                self.wait_for("> ")
                return
        raise AssertionError("Ctrl-C at the prompt brought no new prompt")

    def close(self) -> None:
        os.close(self._master)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _take_terminal() -> None:
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as from a shell, whatever these tests were started by
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
