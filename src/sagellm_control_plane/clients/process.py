"""An engine in a child process: started, watched, ended, and found again by the next manager.

Holds `ProcessEngineClient` and `kill_recorded`. The child is a session of its own and outlives its manager for
`orphan_timeout_s`, so that a manager that restarts finds its engines loaded. What it says goes to
`<run_dir>/<engine>.log`, whose end stands in the errors of a start that failed.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_control_plane.clients.base import EngineLostError, EngineRecord
from sagellm_control_plane.clients.connection import EngineConnection
from sagellm_control_plane.clients.socket_engine import SocketEngine
from sagellm_control_plane.clients.supervision import WatchedProcess, process_started_at
from sagellm_control_plane.engine_process import ProcessOptions
from sagellm_core.config import LLMEngineConfig
from sagellm_protocol import InvalidArgumentError, NotFoundError, UnavailableError, parse

if TYPE_CHECKING:
    from typing_extensions import Self

ENGINE_COMMAND = (sys.executable, "-m", "sagellm_control_plane.engine_process")

# From a child's birth, or a manager's greeting, to the first word: importing torch, with all cores busy.
_GREETING_TIMEOUT_S = 60.0
# How long a broken connection waits for the news that the process ended, and how.
_EXIT_NEWS_S = 0.03
_LOG_TAIL_BYTES = 2048
_LOG_TAIL_LINES = 6
_MAX_SOCKET_PATH = 100  # the kernel takes a little more


class ProcessEngineClient(SocketEngine):
    """An engine in a process of its own on this machine.

    Args:
        config: of the engine.
        run_dir: for sockets and logs; made with mode 0700, and nobody else may own it.
        orphan_timeout_s: how long the child waits for a manager after its own has gone.
        stop_timeout_s: what the child gets for an end in order before it is killed.
        command: starts the child; the engine's id is added. Another one may bind it to cores (`taskset`, `numactl`) or
            serve another engine (see `engine_process.main`).
    """

    def __init__(
        self,
        config: LLMEngineConfig,
        *,
        run_dir: str | Path,
        orphan_timeout_s: float = 60.0,
        stop_timeout_s: float = 15.0,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        super().__init__(config)
        self._command = command
        self._run_dir = Path(run_dir).absolute()
        self._orphan_timeout_s = orphan_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: WatchedProcess | None = None
        self._endpoint = ""
        self._epoch = ""
        self._is_ending = False  # by our own wish

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return None if self._process is None or not self._process.is_alive else self._process.pid

    @property
    def returncode(self) -> int | None:
        """How the last child ended: its status, or the negative number of a signal; None: it lives, or is unknown."""
        return None if self._process is None else self._process.returncode

    @property
    def is_struck(self) -> bool:
        """Whether its silence or its end came from outside, see `WatchedProcess.is_struck`."""
        return self._process is not None and self._process.is_struck

    @property
    def log_path(self) -> Path:
        """Where the child's words go; what the one before it said stands beside it in `.log.1`."""
        return self._run_dir / f"{_file_name(self.engine_id)}.log"

    def log_tail(self) -> str:
        """The last lines that the child said, as one line."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return " | ".join(line.strip() for line in lines[-_LOG_TAIL_LINES:] if line.strip())

    # ---- life -----------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await self._end_process()  # of one whose connection broke
        self._is_ending = False
        self._epoch = secrets.token_hex(8)
        _make_private(self._run_dir)
        self._endpoint = f"ipc://{self._socket_path()}"
        self._process = self._spawn()
        try:
            await self._connect()
        except BaseException:  # also a cancelled start
            self._is_ending = True
            await asyncio.shield(self._end_process())
            raise

    async def stop(self) -> None:
        """End all requests with the finish reason `abort` and the child with them; by force if it takes too long."""
        async with self._life:
            self._is_ending = True
            if self._line is not None and self._process is not None and self.is_running:
                self._line.stop_engine()
                await self._process.wait(self._stop_timeout_s)
            await self._end_process()
            self._drop_line(UnavailableError("the engine was stopped; call start() first"))

    async def kill(self) -> None:
        """End the child by force; returns when it is gone. What is in flight raises `EngineLostError`."""
        self._is_ending = True
        if self._process is not None:
            self._process.signal(signal.SIGKILL)
        self._drop_line(self._loss("was killed by its manager"))
        async with self._life:
            await self._end_process()

    async def detach(self) -> None:
        """Let go of the child and leave it running for whoever adopts it in time; its requests end."""
        async with self._life:
            process, self._process = self._process, None
            self._drop_line(self._loss("was left to another manager"))
            if process is not None:
                process.release()

    def record(self) -> EngineRecord:
        """What `adopt` needs to find the child again."""
        if self._process is None or not self.is_running:
            raise UnavailableError("the engine is not running; call start() first")
        return EngineRecord(
            engine_id=self.engine_id,
            pid=self._process.pid,
            started_at=self._process.started_at,
            endpoint=self._endpoint,
            epoch=self._epoch,
            config=self._given.model_dump(mode="json", exclude_unset=True),
        )

    @classmethod
    async def adopt(cls, record: EngineRecord, **options: Any) -> Self:
        """Take over the child of an earlier manager; whatever that one had asked for ends. `options` as for a new one.

        Raises:
            NotFoundError: that process has ended.
            UnavailableError: it does not answer, or not as the one that is recorded; see `kill_recorded`.
        """
        config = parse(LLMEngineConfig, record.config, what="recorded engine configuration")
        run_dir = Path(record.endpoint.removeprefix("ipc://")).parent
        client = cls(config, **{"run_dir": run_dir, **options})
        if not _is_running(record):
            raise NotFoundError(
                f"engine {record.engine_id} (process {record.pid}) has ended", engine_id=record.engine_id
            )
        async with client._life:
            client._endpoint, client._epoch = record.endpoint, record.epoch
            client._process = WatchedProcess(record.pid, on_exit=client._on_exit)
            try:
                await client._connect()
            except BaseException:
                client._process.release()
                client._process = None
                raise
        return client

    # ---- steps of the above ---------------------------------------------------------------------------

    def _spawn(self) -> WatchedProcess:
        options = ProcessOptions(
            config=self._given, endpoint=self._endpoint, epoch=self._epoch, orphan_timeout_s=self._orphan_timeout_s
        )
        with suppress(FileNotFoundError):
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        # A file and no pipe, so that nobody waits for anybody; and no arguments, which all users of a machine can see.
        with tempfile.TemporaryFile() as stdin, open(self.log_path, "ab", opener=_private_opener) as log:
            stdin.write(options.model_dump_json(exclude_unset=True).encode())
            stdin.seek(0)
            try:
                return WatchedProcess.spawn(
                    [*self._command, self.engine_id],
                    environment={**os.environ, "PYTHONSAFEPATH": "1"},
                    stdin=stdin,
                    log=log,
                    on_exit=self._on_exit,
                )
            except OSError as error:
                raise UnavailableError(f"cannot start {self._command[0]}: {error.strerror}") from error

    async def _connect(self) -> None:
        line = EngineConnection(self.engine_id, self._endpoint, on_break=self._on_break, on_report=self._on_report)
        self._line = line
        try:
            welcome = await asyncio.wait_for(asyncio.shield(line.welcome), _GREETING_TIMEOUT_S)
            if welcome.epoch != self._epoch:
                raise UnavailableError(f"another engine answers for {self.engine_id} at {self._endpoint}")
            await self._use(line, await asyncio.shield(line.ready))
        except asyncio.TimeoutError:
            error = UnavailableError(f"engine {self.engine_id} said nothing for {_GREETING_TIMEOUT_S:g} s")
            self._drop_line(error)
            raise error from None
        except BaseException as error:
            self._drop_line(error if isinstance(error, UnavailableError) else self._loss("was given up"))
            raise

    async def _end_process(self) -> None:
        """By force, if it lives."""
        process = self._process
        if process is None:
            return
        process.signal(signal.SIGKILL)
        await process.wait()
        with suppress(FileNotFoundError):
            self._socket_path().unlink()

    def _on_break(self, reason: str) -> None:
        """The connection tells of a death before the process does."""
        asyncio.get_running_loop().call_later(_EXIT_NEWS_S, self._end_if, self._line, reason)

    def _end_if(self, line: EngineConnection | None, reason: str) -> None:
        if self._line is line:
            self._end(reason)

    def _on_exit(self) -> None:
        self._end("died")

    def _end(self, reason: str) -> None:
        """It is gone. During its start that is said with the end of its log, later to all who wait."""
        if self._is_ending or self._line is None:
            return
        if not self._line.is_alive:
            tail = self.log_tail()
            error = self._loss(
                f"{reason} before it was ready", f"; its log {self.log_path} ends: {tail}" if tail else ""
            )
            self._drop_line(error)
        else:
            self._lose(self._loss(reason))

    def _loss(self, reason: str, hint: str = "") -> EngineLostError:
        process = self._process
        returncode = None if process is None else process.returncode
        return EngineLostError(
            f"engine {self.engine_id} {reason}{_describe_end(returncode)}{hint}",
            engine_id=self.engine_id,
            pid=None if process is None else process.pid,
            returncode=returncode,
        )

    def _socket_path(self) -> Path:
        path = self._run_dir / f"{_file_name(self.engine_id)[:24]}-{self._epoch[:8]}.sock"
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise InvalidArgumentError(
                f"run_dir {self._run_dir} is too long for a socket's path; choose a shorter one", field="run_dir"
            )
        return path


def kill_recorded(record: EngineRecord) -> bool:
    """End the process of a record by force, if it still is that process; whether it was."""
    if not _is_running(record):
        return False
    with suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGKILL)
    return True


def _is_running(record: EngineRecord) -> bool:
    return process_started_at(record.pid) == record.started_at


def _file_name(engine_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", engine_id)


def _private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _make_private(folder: Path) -> None:
    """Whoever reaches the sockets is obeyed, so nobody else may."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InvalidArgumentError(
            f"run_dir {folder} must belong to this user alone; chmod 700 it or choose another", field="run_dir"
        )


def _describe_end(returncode: int | None) -> str:
    if returncode is None:
        return ""
    if returncode < 0:
        with suppress(ValueError):
            return f" ({signal.Signals(-returncode).name})"
    return f" (status {returncode})"
