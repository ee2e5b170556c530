"""Groups of options: one parameter of a command, many on its command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from sagellm_core.options import EngineFlags, with_flags


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--width", "-w", min=1)] = 2
    names: Annotated[list[str] | None, typer.Option("--name")] = None


@dataclass(frozen=True)
class Other:
    width: int = 3


def call(*arguments: str) -> tuple[int, list[Any]]:
    app, calls = typer.Typer(), []

    @app.command()
    @with_flags
    def draw(size: Size, what: Annotated[str, typer.Argument()], again: bool = False) -> None:
        """Draw something."""
        calls.append((size, what, again))

    return CliRunner().invoke(app, list(arguments)).exit_code, calls


def test_a_group_is_spread_out_and_collected_again() -> None:
    assert call("square") == (0, [(Size(), "square", False)])
    status, calls = call("-w", "5", "--name", "a", "--name", "b", "square", "--again")
    assert (status, calls) == (0, [(Size(5, ["a", "b"]), "square", True)])


def test_its_options_are_checked() -> None:
    assert call("-w", "0", "square") == (2, [])
    assert call() == (2, [])


def test_two_groups_with_one_name_are_a_mistake_of_ours() -> None:
    def draw(size: Size, other: Other) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'width'"):
        with_flags(draw)


def test_engine_options_are_those_that_were_given() -> None:
    assert EngineFlags().options() == {}
    flags = EngineFlags(model="m", backend="cpu", max_model_len=8, dtype="bf16")
    assert flags.options() == {"max_model_len": 8, "dtype": "bf16"}
