"""Settings of the gateway: sections, keys of the user, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sagellm_core.addresses import is_loopback
from sagellm_gateway.keys import add_key, new_key
from sagellm_gateway.settings import GatewaySettings, parse_settings
from sagellm_protocol import InvalidArgumentError

HASH = "sha256:" + "0" * 64


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"SAGELLM_KEYS": str(tmp_path / "keys.yaml")}


def test_the_defaults_are_for_this_machine_alone(environ: dict[str, str]) -> None:
    settings = parse_settings({}, environ=environ)
    assert settings == GatewaySettings()
    assert (settings.server.host, settings.auth.keys, settings.cors.allow_origins) == ("127.0.0.1", [], [])
    assert not settings.log.prompts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"server": {"prot": 1}}, "did you mean 'port'?"),
        ({"server": {"port": 70000}}, "server.port must be <= 65535, got 70000"),
        ({"server": {"tls_cert": "a.pem"}}, "tls_cert and tls_key belong together"),
        ({"auth": {"keys": [{"name": "ada", "hash": "sk-sage-secret"}]}}, "never the key itself"),
        ({"auth": {"keys": [{"name": "a", "hash": HASH}] * 2}}, "two of the name 'a'"),
        ({"limits": {"per_key": {"requests_per_minute": 0}}}, "requests_per_minute must be >= 1"),
        ({"cors": {"allow_origins": ["*"], "allow_credentials": True}}, "allow_credentials needs named origins"),
        ({"log": {"access": True}}, "log.access"),
    ],
)
def test_what_is_wrong_is_said_with_where_and_what(environ: dict[str, str], data: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_settings(data, what="gateway.yaml", environ=environ)
    assert message in caught.value.message
    assert "gateway.yaml" in caught.value.message
    assert "secret" not in caught.value.message


def test_keys_of_the_user_are_added(tmp_path: Path, environ: dict[str, str]) -> None:
    _, kept = new_key("from-file")
    add_key(Path(environ["SAGELLM_KEYS"]), kept)
    environ |= {"SAGELLM_API_KEY": "k" * 20, "SAGELLM_ADMIN_KEY": "a" * 20}
    settings = parse_settings({"auth": {"open_metrics": True}}, environ=environ)
    assert [(key.name, key.admin) for key in settings.auth.keys] == [
        ("from-file", False),
        ("sagellm_api_key", False),
        ("sagellm_admin_key", True),
    ]
    assert settings.auth.open_metrics


def test_a_key_that_can_be_guessed_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="SAGELLM_API_KEY must have at least 20"):
        parse_settings({}, environ={**environ, "SAGELLM_API_KEY": "sk-1234"})


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
