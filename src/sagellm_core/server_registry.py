"""Which servers of ours run on this machine: one small file each, written when it is ready and removed when it ends.

The files lie in `~/.cache/sage-llm/servers/HOST` (or below `XDG_CACHE_HOME`), readable by their owner alone; a home
folder that several machines share has a folder for each. A file is written under another name and renamed, so nobody
reads half of one. What a killed server left behind is removed by the next look.

A file's process is ours only if its id, its start and its command line are those that the file names: ids are used
again. The start counts from the machine's boot, because the clock may be set while a server runs; the command line is
kept as a hash, because it may hold a key.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

_TOLERANCE_S = 2.0  # the system rounds the time of its boot to seconds


@dataclass(frozen=True)
class ServerRecord:
    """One server, as its file says."""

    name: str
    kind: str  # gateway or engine
    url: str  # to call it by, without a path
    models: list[str]
    pid: int
    started_s: float  # since the machine's boot
    command_hash: str
    since: float  # seconds of the epoch at which it was ready

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.url.rpartition(":")[2])

    @property
    def process(self) -> psutil.Process | None:
        """The server's process; None if it has ended, whoever has its id now."""
        try:
            process, started_s, command_hash = _look_at(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            is_same = abs(started_s - self.started_s) <= _TOLERANCE_S
            return process if is_same and command_hash == self.command_hash else None
        except psutil.Error:
            return None


def registry_folder() -> Path:
    """Where the files of this machine lie."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "sage-llm" / "servers" / (platform.node() or "localhost")


def list_servers() -> list[ServerRecord]:
    """The servers that run, oldest first; files of others are removed."""
    folder = registry_folder()
    if not folder.is_dir():
        return []
    with _locked(folder):
        return sorted(_running(folder), key=lambda record: record.since)


@contextmanager
def registered(*, kind: str, url: str, models: Sequence[str], name: str | None = None) -> Iterator[str | None]:
    """List this process as a server while the body runs; the name it got, or None where nothing can be written.

    A name that a running server has is numbered. `name` is by default the first model's, without its folders.
    """
    file = None
    try:
        file = _write(kind, url, list(models), _short(name or models[0]))
    except OSError as error:  # a server that cannot be listed serves all the same
        logger.warning("this server will not stand in `sage-llm ps`: %s", error)
    try:
        yield None if file is None else file.stem
    finally:
        if file is not None:
            with suppress(OSError):
                file.unlink()


def _write(kind: str, url: str, models: list[str], name: str) -> Path:
    folder = registry_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    process, started_s, command_hash = _look_at(os.getpid())
    with _locked(folder):
        taken = {record.name for record in _running(folder)}
        names = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
        free = next(name for name in names if name not in taken)
        record = ServerRecord(
            name=free,
            kind=kind,
            url=url,
            models=models,
            pid=process.pid,
            started_s=started_s,
            command_hash=command_hash,
            since=time.time(),
        )
        draft, file = folder / f"{process.pid}.new", folder / f"{free}.json"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
            json.dump(asdict(record), out)
        draft.replace(file)
    return file


def _running(folder: Path) -> list[ServerRecord]:
    records = []
    for file in folder.glob("*.json"):
        try:
            record = ServerRecord(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not ours, or of another version
            continue
        if record.process is not None:
            records.append(record)
        else:
            with suppress(OSError):
                file.unlink()
    return records


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; nobody keeps it for longer than a few files take."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _short(model: str) -> str:
    """The end of a path or hub id, as a file may be named."""
    end = model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in end).lstrip(".-") or "server"


def _look_at(pid: int) -> tuple[psutil.Process, float, str]:
    """A process, its start in seconds since the machine's boot, and the hash of its command line."""
    # First, because psutil adds the ticks of a start to the boot time that it read last, which may jump by a second.
    boot_time = psutil.boot_time()
    process = psutil.Process(pid)
    command_hash = hashlib.sha256("\0".join(process.cmdline()).encode()).hexdigest()
    return process, process.create_time() - boot_time, command_hash
