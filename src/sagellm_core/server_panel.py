"""What a server says of itself when it is ready: one panel in a terminal, the same as plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sagellm_core.version import __version__


@dataclass(frozen=True)
class ServerPanel:
    """The facts; `rows` are (label, text), `example` is a command line that calls the server."""

    models: Sequence[str]
    url: str  # to call it by, path included
    rows: Sequence[tuple[str, str]]
    example: str

    def show(self) -> None:
        """Print it to standard error."""
        if sys.stderr.isatty():
            self._draw()
        else:
            print("\n".join(self.lines()), file=sys.stderr, flush=True)

    def lines(self) -> list[str]:
        """As plain text."""
        rows = [f"  {label}: {text}" for label, text in self.rows]
        return [f"Serving {', '.join(self.models)} at {self.url}", *rows, f"  try: {self.example}"]

    def _draw(self) -> None:
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        console = Console(stderr=True, highlight=False)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("url", Text(self.url, style="bold"))
        for label, text in self.rows:
            grid.add_row(label, Text(text))
        console.print(Panel(grid, title=f"sageLLM {__version__}", title_align="left", border_style="dim", expand=False))
        # Below the panel and not wrapped by us, so that it can be copied as one line.
        console.print(Text(self.example, style="dim"), soft_wrap=True)


def engine_rows(engines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Rows about engines, each as `LLMEngine.get_info` describes it: four for a single one, else one each."""
    if len(engines) == 1:
        (info,) = engines
        return [
            ("model", _joined(info["model"], info.get("architecture"), _formats(info))),
            ("device", _joined(_device(info), _kernels(info))),
            ("memory", _memory(info)),
            ("context", f"{_context(info)}, {info['max_batch_size']} requests at a time"),
        ]
    return [
        (info["model"], _joined(_formats(info), info.get("device"), _memory(info), _context(info))) for info in engines
    ]


def _joined(*parts: str | None) -> str:
    return " · ".join(part for part in parts if part)


def _formats(info: Mapping[str, Any]) -> str:
    """Formats of the matrices, the most frequent one first."""
    formats: Mapping[str, int] = info.get("weight_formats") or {}
    return " and ".join(sorted(formats, key=lambda name: -formats[name])[:2])


def _device(info: Mapping[str, Any]) -> str:
    name = str(info.get("device_name") or "")
    return _joined(str(info.get("device", "")), name)


def _kernels(info: Mapping[str, Any]) -> str:
    return f"kernels {info['kernels']['linear']}" if info.get("kernels", {}).get("linear") else ""


def _memory(info: Mapping[str, Any]) -> str:
    weights = f"{format_bytes(info.get('weight_bytes', 0))} weights"
    cache = _num_cache_tokens(info) * info.get("kv_bytes_per_token", 0)
    return f"{weights} + {format_bytes(cache)} KV cache" if cache else weights


def _context(info: Mapping[str, Any]) -> str:
    room = _num_cache_tokens(info)  # none in a model that keeps no cache, such as one for embeddings
    return f"{info['max_model_len']:,} tokens a request" + (f", {room:,} in the cache" if room else "")


def _num_cache_tokens(info: Mapping[str, Any]) -> int:
    return int(info.get("kv_blocks", 0)) * int(info.get("kv_block_size", 0))


def format_bytes(num_bytes: int) -> str:
    """Such as `9.9 MiB`, `192 MiB` or `1.2 GiB`."""
    unit, size = ("GiB", num_bytes / 2**30) if num_bytes >= 2**30 else ("MiB", num_bytes / 2**20)
    return f"{size:.0f} {unit}" if size >= 100 else f"{size:.1f} {unit}"


def url_to_call(url: str) -> str:
    """The address to call a server by that listens on every network: that of this machine itself."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:", 1).replace("//[::]:", "//[::1]:", 1)
