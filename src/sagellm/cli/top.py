"""`sage-llm top`: a gateway as it works, once a second: engines, queue, rates, latencies, what happened last."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sagellm.cli.server_client import ServerClient
from sagellm.cli.servers import find_server, format_duration
from sagellm_core.server_registry import list_servers
from sagellm_protocol import InvalidArgumentError, SageLLMError

_TIMEOUT_S = 5.0
_BAR_CELLS = 6
_NUM_EVENTS = 8
_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "stopped": "dim", "error": "red"}


def top_command(server: str | None, url: str | None, api_key: str | None, *, interval_s: float, once: bool) -> None:
    """Show a gateway until Ctrl-C; one picture alone with `once`, or where the output is no terminal."""
    client = _client(server, url, api_key)
    console = Console(highlight=False)
    view = TopView(client.url)
    stats = client.get("/admin/stats")
    if once or not console.is_terminal:
        console.print(view.picture(stats))
        return
    try:
        with Live(view.picture(stats), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval_s)
                live.update(_look(client, view), refresh=True)
    except KeyboardInterrupt:
        return


def _client(server: str | None, url: str | None, api_key: str | None) -> ServerClient:
    if url is not None:
        if server is not None:
            raise InvalidArgumentError("name a server or give its --url, not both", field="server")
        return ServerClient(url, api_key=api_key, timeout_s=_TIMEOUT_S)
    gateways = [record for record in list_servers() if record.kind == "gateway"]
    return ServerClient(find_server(gateways, server).url, api_key=api_key, timeout_s=_TIMEOUT_S, is_own=True)


def _look(client: ServerClient, view: TopView) -> RenderableType:
    try:
        return view.picture(client.get("/admin/stats"))
    except SageLLMError as error:
        return view.problem(error.message)


class TopView:
    """Draws what `/admin/stats` says; knows the picture before, for rates of single engines."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before: Mapping[str, Any] | None = None
        self._last: RenderableType = Text()

    def picture(self, stats: Mapping[str, Any]) -> RenderableType:
        """The server at this moment."""
        self._last = Group(
            self._head(stats), self._figures(stats), self._engines(stats), *_events(stats["events"][-_NUM_EVENTS:])
        )
        self._before = stats
        return self._last

    def problem(self, message: str) -> RenderableType:
        """The last picture, and why there is no newer one."""
        return Group(self._last, Text(f"\n{message}; trying again", style="red"))

    def _head(self, stats: Mapping[str, Any]) -> RenderableType:
        policies = stats["policies"]
        head = Text(self._url, style="bold")
        head.append(
            f"  {', '.join(stats['models'])} · up {format_duration(stats['uptime_s'])} · "
            f"scheduling {policies['scheduling']} · routing {policies['routing']}",
            style="dim",
        )
        return head

    def _figures(self, stats: Mapping[str, Any]) -> RenderableType:
        engines, rates, totals = stats["engines"], stats["rates"], stats["totals"]
        table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
        table.add_row(
            _figure("queue", str(stats["queue_depth"])),
            _figure("running", str(sum(engine["num_running"] for engine in engines))),
            _figure("requests/s", f"{rates['requests_per_s']:.1f}"),
            _figure("output tokens/s", f"{rates['output_tokens_per_s']:.0f}"),
            _figure("requests", f"{totals['requests']:,}"),
            _figure("failed", f"{totals['failed']:,}", style="red" if totals["failed"] else ""),
        )
        lines: list[RenderableType] = [Text(), table]
        for name, label in (("ttft_ms", "time to first token"), ("tpot_ms", "time per output token")):
            figures = stats[name]
            if figures["p50"] is not None:
                values = " · ".join(f"{rank} {value:.1f}" for rank, value in figures.items())
                lines.append(Text.assemble((f"{label}, ms  ", "dim"), values))
        return Group(*lines)

    def _engines(self, stats: Mapping[str, Any]) -> RenderableType:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("engine", "model", "state", "pid", "load", "run", "wait", "KV", "hits", "tok/s"):
            is_text = column in ("engine", "model", "state", "load")
            table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "model")
        for engine in stats["engines"]:
            table.add_row(
                engine["engine_id"],
                engine["model"],
                Text(engine["state"], style=_STYLES.get(engine["state"], "")),
                "" if engine["pid"] is None else str(engine["pid"]),
                _bar(engine["load"]),
                str(engine["num_running"]),
                str(engine["num_waiting"]),
                f"{engine['kv_usage']:.0%}",
                f"{engine['prefix_hit_rate']:.0%}",
                self._rate(engine, stats["time"]),
            )
            if engine["error"]:
                table.add_row("", Text(engine["error"], style="red"))
        return table

    def _rate(self, engine: Mapping[str, Any], now: float) -> str:
        """Output tokens a second of one engine since the picture before; empty in the first one."""
        before = self._before
        if before is None or now <= before["time"]:
            return ""
        for earlier in before["engines"]:
            if earlier["engine_id"] == engine["engine_id"]:
                num_tokens = engine["num_output_tokens"] - earlier["num_output_tokens"]
                return f"{max(0, num_tokens) / (now - before['time']):.0f}"
        return ""


def _figure(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((value, f"bold {style}".strip()), (f" {label}", "dim"))


def _bar(share: float) -> Text:
    num_full = min(_BAR_CELLS, round(share * _BAR_CELLS))
    num_full = max(num_full, 1) if share > 0 else 0
    style = "red" if share >= 1 else "green"
    return Text.assemble(("█" * num_full, style), ("░" * (_BAR_CELLS - num_full), "dim"), f" {share:.0%}")


def _events(events: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """The last events, newest first."""
    return [
        Text.assemble((time.strftime("%H:%M:%S  ", time.localtime(event["time"])), "dim"), event["message"])
        for event in reversed(events)
    ]
