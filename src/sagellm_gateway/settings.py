"""How a gateway is run: where it listens, who may call it, how much, and what it writes about it.

A file holds the sections of `GatewaySettings` (see `config_file`); what it leaves out has the defaults written here,
which suit one person's machine: loopback only, no key, nothing cross-origin. The user's key file adds keys, and so do
`SAGELLM_API_KEY` and `SAGELLM_ADMIN_KEY`.

::

    server: {host: 0.0.0.0, port: 8000, tls_cert: cert.pem, tls_key: key.pem}
    auth:
      keys:
        - {name: ada, hash: "sha256:…", limits: {requests_per_minute: 60}}
    limits: {total: {tokens_per_minute: 100000}}
    cors: {allow_origins: ["https://chat.example.com"]}
    log: {access: json}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sagellm_gateway.keys import KEYS_FILE, ApiKey, RateLimits, key_of, read_keys
from sagellm_gateway.sessions.session import SessionSettings
from sagellm_gateway.tracing import TracingSettings
from sagellm_protocol import EdgeModel, InvalidArgumentError, parse

_KEY_VARIABLES = {"SAGELLM_API_KEY": False, "SAGELLM_ADMIN_KEY": True}  # -> whether it may use /admin

_Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServerSettings(EdgeModel):
    """Where the gateway listens, and how long it waits for a client."""

    host: str = Field(default="127.0.0.1", min_length=1, max_length=255)
    port: int = Field(default=8000, ge=0, le=65_535, description="0 takes a free one.")
    tls_cert: Path | None = Field(default=None, description="Certificate chain in PEM; needs tls_key.")
    tls_key: Path | None = Field(default=None, description="Its private key in PEM, without a password.")
    allowed_hosts: list[str] = Field(
        default_factory=list,
        max_length=100,
        description="Names that a gateway without keys on loopback may be called by, besides localhost and addresses.",
    )
    trusted_proxies: list[str] = Field(
        default_factory=list, max_length=100, description="Addresses whose X-Forwarded-For and -Proto are believed."
    )
    keep_alive_s: _Seconds = Field(default=75, description="How long an idle connection stays open.")
    header_timeout_s: _Seconds = Field(default=20, description="From a request's first byte to the end of its headers.")
    body_timeout_s: _Seconds = Field(default=30, description="Between two parts of a body.")
    send_timeout_s: _Seconds = Field(default=120, description="How long a client may take nothing of its answer.")
    drain_delay_s: float = Field(
        default=0, ge=0, le=3600, description="How long after SIGTERM it serves on, for a load balancer to notice."
    )
    grace_s: float = Field(default=30, ge=0, le=86_400, description="What answers in flight get after SIGTERM.")
    max_header_bytes: int = Field(default=32_768, ge=1024, le=2**20)

    @model_validator(mode="after")
    def _check_tls(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidArgumentError("tls_cert and tls_key belong together; give both or neither", field="tls_cert")
        return self


class AuthSettings(EdgeModel):
    """Who may call."""

    keys: list[ApiKey] = Field(default_factory=list, max_length=100_000)
    allow_no_key: bool = Field(default=False, description="Listen beyond this machine although nobody needs a key.")
    open_metrics: bool = Field(default=False, description="Let /metrics be read without a key.")

    @model_validator(mode="after")
    def _check_names(self) -> AuthSettings:
        names: set[str] = set()
        for key in self.keys:
            if key.name in names:
                raise InvalidArgumentError(f"keys has two of the name {key.name!r}; rename one", field="keys")
            names.add(key.name)
        return self


class LimitSettings(EdgeModel):
    """How much may be asked for."""

    per_key: RateLimits = Field(default_factory=RateLimits, description="Of each key that has no limits of its own.")
    total: RateLimits = Field(
        default_factory=lambda: RateLimits(max_concurrent=4096), description="Of all callers together."
    )
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024, le=2**30)
    max_json_depth: int = Field(default=64, ge=8, le=256, description="Objects and lists within each other.")
    request_timeout_s: _Seconds = Field(default=600, description="From a request's arrival to the end of its answer.")


class CorsSettings(EdgeModel):
    """Which web pages of other origins may call; none without `allow_origins`."""

    allow_origins: list[str] = Field(default_factory=list, max_length=100, description='Origins, or ["*"].')
    allow_credentials: bool = Field(default=False, description="Let browsers send cookies along; not with *.")
    max_age_s: int = Field(default=600, ge=0, le=86_400, description="How long a browser may remember the answer.")

    @model_validator(mode="after")
    def _check_credentials(self) -> CorsSettings:
        if self.allow_credentials and "*" in self.allow_origins:
            raise InvalidArgumentError(
                "allow_credentials needs named origins; replace * in allow_origins", field="allow_credentials"
            )
        return self


class LogSettings(EdgeModel):
    """What is written about requests, to standard error."""

    access: Literal["off", "text", "json"] = Field(default="text", description="One line a request.")
    prompts: bool = Field(default=False, description="Write the prompts' text into those lines, too.")


class GatewaySettings(EdgeModel):
    """All of it; see the module."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    cors: CorsSettings = Field(default_factory=CorsSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    sessions: SessionSettings = Field(default_factory=SessionSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)


def parse_settings(
    data: Mapping[str, Any], *, what: str = "settings", environ: Mapping[str, str] = os.environ
) -> GatewaySettings:
    """Settings from plain values, with the keys of the user's key file and of the environment added.

    Raises `InvalidArgumentError` that names `what` and the field.
    """
    settings = parse(GatewaySettings, dict(data), what=what)
    keys = [*settings.auth.keys, *_keys_of_user(environ)]
    auth = parse(AuthSettings, {**settings.auth.given(), "keys": keys}, what=what)
    return settings.model_copy(update={"auth": auth})


def _keys_of_user(environ: Mapping[str, str]) -> list[ApiKey]:
    file = Path(environ.get("SAGELLM_KEYS") or KEYS_FILE).expanduser()
    keys = read_keys(file)
    for variable, is_admin in _KEY_VARIABLES.items():
        if environ.get(variable):
            keys.append(key_of(environ[variable], name=variable.lower(), admin=is_admin, what=variable))
    return keys
