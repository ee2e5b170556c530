"""What commands show: tables of figures, and a bar while they work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

    from rich.progress import Progress
    from rich.table import Table


def figures_table(*columns: str, text: Container[str]) -> Table:
    """A table without rows: the columns named in `text` begin at the left, figures end at the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in text else "right", no_wrap=True)
    return table


def progress_bar() -> Progress:
    """A bar on stderr that goes away, so that pipes get the table alone; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
