"""A real server process with the built-in model, for clients that nobody here wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_process import server

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Others' clients may warn as they like; a warning is an error in tests of our own code alone."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`http://127.0.0.1:PORT` of `sage-llm serve`."""
    with server(["serve", "--model", "builtin"], tmp_path_factory.mktemp("home")) as process:
        yield process.url


@pytest.fixture(scope="session")
def base_url(server_url: str) -> str:
    """Where OpenAI's clients begin."""
    return f"{server_url}/v1"
