"""API keys: made, kept as hashes, revoked."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sagellm_gateway.keys import RateLimits, add_key, hash_of, key_of, new_key, read_keys, revoke_key
from sagellm_protocol import InvalidArgumentError


def test_only_the_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "keys.yaml"
    key, kept = new_key("ada", admin=True, limits=RateLimits(max_concurrent=2))
    add_key(file, kept)
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == [kept]
    assert kept.hash == hash_of(key.encode())
    assert list(file.parent.iterdir()) == [file]


def test_keys_are_different_and_long() -> None:
    keys = {new_key("x")[0] for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 50 for key in keys)


def test_names_are_unique_and_keys_can_be_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add_key(file, new_key("ada")[1])
    with pytest.raises(InvalidArgumentError, match="has a key named 'ada'"):
        add_key(file, new_key("ada")[1])
    with pytest.raises(InvalidArgumentError, match="no key named 'bob'; it has ada"):
        revoke_key(file, "bob")
    revoke_key(file, "ada")
    assert read_keys(file) == []


@pytest.mark.parametrize("text", ["a: b", "[{name: x}]", "[", "[{name: x, hash: sk-sage-x}]"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=str(file)):
        read_keys(file)


@pytest.mark.parametrize("key", ["short", "x" * 19, "with space in the middle", "ä" * 30, "new\nline" * 5])
def test_weak_keys_are_refused(key: str) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 20 visible ASCII"):
        key_of(key, name="x")
