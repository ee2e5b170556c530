"""Facts about a process on this machine: whether it lives, how it ended, and which one of its number it is.

Holds `WatchedProcess`. It need not be our child: the process of an earlier manager can be watched and killed as well,
only how it ended is then unknown. `is_struck` tells an end that came from outside from one of its own making.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

import psutil

from sagellm_protocol import NotFoundError

HAS_PIDFD = hasattr(os, "pidfd_open")


def process_started_at(pid: int) -> float | None:
    """When the process began, in seconds since the machine did (elsewhere than on Linux: since 1970); None: no such.

    One that has ended counts until it is reaped.
    Tells a process from a later one with the same number. The date that psutil gives moves when a clock is set.
    """
    if sys.platform != "linux":
        try:
            return float(psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None
    fields = _stat_of(pid)
    return None if fields is None else int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _stat_of(pid: int) -> list[bytes] | None:
    """What Linux knows of a process, from its state on; None: no such process, or no Linux."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _num_oom_kills() -> int | None:
    """Processes that the kernel has killed for want of memory since the machine began; None where it does not say."""
    try:
        with open("/proc/vmstat", "rb") as file:
            lines = [line for line in file if line.startswith(b"oom_kill ")]
    except FileNotFoundError:
        return None
    return int(lines[0].split()[1]) if lines else None


class WatchedProcess:
    """A process whose end is told in the running event loop: `on_exit` is called once, when it has ended.

    `returncode` is then known if it is our child: its status, or the negative number of the signal that ended it.
    """

    def __init__(self, pid: int, *, on_exit: Callable[[], None]) -> None:
        started_at = process_started_at(pid)
        if started_at is None:
            raise NotFoundError(f"there is no process {pid}", pid=pid)
        self.pid = pid
        self.started_at = started_at
        self.returncode: int | None = None
        self._num_oom_kills = _num_oom_kills()
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._is_released = False
        self._pidfd: int | None = None
        if HAS_PIDFD:
            self._pidfd = os.pidfd_open(pid)
            self._loop.add_reader(self._pidfd, self._reap)
        else:
            threading.Thread(target=self._wait, name=f"wait-{pid}", daemon=True).start()

    @classmethod
    def spawn(
        cls,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: IO[bytes],
        log: IO[bytes],
        on_exit: Callable[[], None],
    ) -> WatchedProcess:
        """Start a program that reads `stdin` and writes all it says to `log`.

        It gets a session of its own: Ctrl-C in our terminal is for us, and our end is not its.
        """
        # It gets nothing of ours but these three files: it may outlive us, and must not keep our locks and sockets.
        child = subprocess.Popen(
            arguments,
            env=environment,
            stdin=stdin,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
        )
        child.returncode = 0  # not its to wait for: the exit is watched here, and may come after this process's own
        return cls(child.pid, on_exit=on_exit)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self._exited.is_set()

    @property
    def is_struck(self) -> bool:
        """Whether a signal that nothing in it sends has ended it (SIGKILL) or holds it (SIGSTOP): not its own doing.

        Where it may have been the kernel for want of memory, or nobody can tell, it counts as its own.
        """
        if self.is_alive:
            fields = _stat_of(self.pid)
            return fields is not None and fields[0] in (b"T", b"t")
        num_oom_kills = _num_oom_kills()
        is_told = num_oom_kills is not None and num_oom_kills == self._num_oom_kills
        return self.returncode == -signal.SIGKILL and is_told

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended within the time."""
        if timeout_s is None:
            await self._exited.wait()
        else:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._exited.wait(), timeout_s)
        return self._exited.is_set()

    def signal(self, number: int) -> None:
        """Send a signal; nothing where it has ended."""
        if not self.is_alive:
            return
        with suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)

    def release(self) -> None:
        """Watch no more; the process goes on."""
        self._is_released = True
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    # ---- the end --------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """In a thread, where the system tells of no process's end by a file."""
        returncode: int | None = None
        with suppress(psutil.NoSuchProcess):
            returncode = psutil.Process(self.pid).wait()
        with suppress(RuntimeError):  # the loop was closed: nobody wants to know
            self._loop.call_soon_threadsafe(self._end, returncode)

    def _reap(self) -> None:
        returncode: int | None = None
        with suppress(ChildProcessError):  # not our child: somebody else learns how it ended
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                returncode = os.waitstatus_to_exitcode(status)
        self._end(returncode)

    def _end(self, returncode: int | None) -> None:
        if self._is_released:
            return
        self.returncode = None if returncode is None else int(returncode)
        self.release()
        self._exited.set()
        self._on_exit()
