"""`sage-llm ps` and `sage-llm stop`: the servers that this user runs on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from sagellm.cli.server_client import ServerClient
from sagellm_core.command import print_quietly
from sagellm_core.server_registry import ServerRecord, list_servers
from sagellm_protocol import InvalidArgumentError, NotFoundError, SageLLMError, UnavailableError

_ASK_TIMEOUT_S = 2.0
_POLL_S = 0.05
# Most servers are gone sooner; for the others it is said what is waited for.
_PATIENCE_S = 2.0


# ---- ps -----------------------------------------------------------------------------------------------


def list_command(*, as_json: bool) -> None:
    """Print the servers that run, and how many requests each has in work."""
    servers = list_servers()
    with ThreadPoolExecutor(max_workers=8) as pool:
        rows = list(pool.map(_describe, servers))
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif rows:
        _print_table(rows)
    else:
        print_quietly("No server of yours runs on this machine; `sage-llm serve` starts one.")


def _describe(server: ServerRecord) -> dict[str, Any]:
    state, num_requests = _ask(server)
    return {
        "name": server.name,
        "kind": server.kind,
        "url": server.url,
        "models": server.models,
        "state": state,
        "num_requests": num_requests,
        "uptime_s": round(max(0.0, time.time() - server.since), 1),
        "pid": server.pid,
    }


def _ask(server: ServerRecord) -> tuple[str, int | None]:
    """The server's state and its requests in work; None where it doesn't say."""
    client = ServerClient(server.url, timeout_s=_ASK_TIMEOUT_S, is_own=True)
    try:
        if server.kind == "engine":
            load = client.get("/info")["load"]
            return "ok", int(load["num_running"] + load["num_waiting"])
        body = client.get("/health")
        num_requests = sum(engine["num_requests"] for engine in body["engines"].values())
        return str(body["status"]), num_requests + int(body["num_waiting"])
    except (SageLLMError, KeyError, TypeError, AttributeError):
        return "not answering", None


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "url", "models", "state", "requests", "up", "pid", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        num_requests = "" if row["num_requests"] is None else str(row["num_requests"])
        models = Text(", ".join(row["models"]))
        table.add_row(
            row["name"],
            row["url"],
            models,
            row["state"],
            num_requests,
            format_duration(row["uptime_s"]),
            str(row["pid"]),
        )
    Console(highlight=False).print(table)


def format_duration(seconds: float) -> str:
    """The two largest units, such as `3 h 20 min`."""
    whole = int(seconds)
    for unit, size, smaller, smaller_size in (
        ("d", 86_400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


# ---- stop ---------------------------------------------------------------------------------------------


def stop_command(which: str | None, *, stop_all: bool, timeout_s: float) -> None:
    """Ask servers to end, wait until they have, and say what happened.

    Raises `NotFoundError` where there is no such server, `UnavailableError` where one has not ended in time.
    """
    if which is not None and stop_all:
        raise InvalidArgumentError("--all stops every server; leave the name out", field="server")
    servers = list_servers()
    chosen = servers if stop_all else [find_server(servers, which)]
    if not chosen:
        print_quietly("No server of yours runs on this machine.")
    started_at = time.monotonic()
    for server in chosen:
        _terminate(server)
    late = [server for server in chosen if not _wait(server, started_at, timeout_s)]
    if late:
        names = ", ".join(server.name for server in late)
        raise UnavailableError(
            f"still ending after {timeout_s:g} s: {names}; `sage-llm stop {late[0].name}` again cuts its answers off"
        )


def find_server(servers: Sequence[ServerRecord], which: str | None) -> ServerRecord:
    """The server of this name, port or process id; without any of those the only one.

    Raises `NotFoundError` where there is none, `InvalidArgumentError` where there are several.
    """
    if which is None:
        found, wanted = list(servers), "no server of yours runs on this machine"
    else:
        found = [server for server in servers if which in (server.name, str(server.port), str(server.pid))]
        known = ", ".join(server.name for server in servers) or "none"
        wanted = f"no server of yours has the name, port or process id {which!r}; running: {known}"
    if not found:
        raise NotFoundError(wanted, field="server")
    if len(found) > 1:
        names = ", ".join(f"{server.name} (port {server.port})" for server in found)
        raise InvalidArgumentError(f"several servers run: {names}; name one of them", field="server")
    return found[0]


def _terminate(server: ServerRecord) -> None:
    process = server.process
    if process is not None:
        try:
            process.terminate()  # psutil looks once more whether it is the same process
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied as error:
            raise UnavailableError(f"{server.name} (pid {server.pid}) belongs to another user; ask them") from error


def _wait(server: ServerRecord, started_at: float, timeout_s: float) -> bool:
    """Whether the server has ended, at most `timeout_s` after it was told to."""
    has_said = False
    while server.process is not None:
        waited_s = time.monotonic() - started_at
        if waited_s >= timeout_s:
            return False
        if waited_s >= _PATIENCE_S and not has_said:
            has_said = True
            print_quietly(f"Waiting for {server.name} to end what it answers …")
        time.sleep(_POLL_S)
    seconds = time.monotonic() - started_at
    print_quietly(f"Stopped {server.name} ({server.url}, pid {server.pid}) after {seconds:.1f} s.")
    return True
