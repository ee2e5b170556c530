"""`sage-llm key`: the key is printed once, its hash is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_process import Cli
from sagellm_gateway.keys import hash_of, read_keys


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.setenv("SAGELLM_KEYS", str(tmp_path / "keys.yaml"))
    return Cli(monkeypatch, capsys)


def test_a_key_is_made_listed_and_revoked(cli: Cli, tmp_path: Path) -> None:
    made = cli("key", "new", "ada", "--admin", "--requests-per-minute", "5")
    secret = made.out.strip()
    kept = read_keys(tmp_path / "keys.yaml")[0]
    assert (made.status, kept.hash, kept.admin) == (0, hash_of(secret.encode()), True)
    assert kept.limits is not None
    assert kept.limits.requests_per_minute == 5
    assert secret not in made.err
    assert cli("key", "list").out == "ada (admin)\n"
    again = cli("key", "new", "ada")
    assert again.status == 2
    assert "has a key named 'ada'" in again.err
    assert cli("key", "revoke", "ada").status == 0
    assert cli("key", "list").out == ""
    assert "no key named 'ada'; it has none" in cli("key", "revoke", "ada").err
