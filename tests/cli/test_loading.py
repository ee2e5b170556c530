"""The bar of a loading model: on terminals, when it takes long, and gone afterwards."""

from __future__ import annotations

import io

import pytest

from sagellm.cli.loading import LoadingBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("sagellm.cli.loading.time.monotonic", lambda: now[0])
    return now


def test_a_long_load_draws_a_bar_and_wipes_it(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = LoadingBar()
    bar(10, 100)
    assert not terminal.getvalue()
    clock[0] += 1.0
    bar(50, 100)
    assert "Loading" in terminal.getvalue()
    assert "50 %" in terminal.getvalue()
    bar(100, 100)
    assert not terminal.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip()


def test_a_quick_load_and_a_pipe_stay_silent(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = LoadingBar()
    for done in range(0, 101, 10):
        bar(done, 100)
    monkeypatch.setattr("sys.stderr", pipe)
    clock[0] += 9.0
    bar(50, 100)
    bar(100, 100)
    assert not terminal.getvalue() + pipe.getvalue()
