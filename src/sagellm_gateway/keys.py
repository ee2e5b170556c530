"""API keys: made once, shown once, kept as a hash.

A key is 32 random bytes in a text that begins with `sk-sage-`. Its SHA-256 is enough to keep: a hash that is slow on
purpose guards passwords, which can be guessed; 256 random bits cannot. The key file is YAML, a list of `ApiKey`.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from sagellm_protocol import EdgeModel, InvalidArgumentError, parse
from sagellm_protocol.fields import Identifier

KEYS_FILE = "~/.sage-llm/keys.yaml"

_PREFIX = "sk-sage-"
_NUM_BYTES = 32
# A key that somebody thought of: short ones can be found by trying.
_MIN_CHARS = 20

_Count = Annotated[int, Field(ge=1, le=2**53)]


def _check_hash(value: str) -> str:
    # By hand, because a message must not repeat what may be the key itself.
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", value):
        raise ValueError(
            "hash must be sha256: and 64 hex digits, as `sage-llm key new` writes it, never the key itself"
        )
    return value


class RateLimits(EdgeModel):
    """How much one caller, or all together, may ask for; None is no limit. A minute is any 60 seconds."""

    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = Field(default=None, description="Of prompts and answers together.")
    max_concurrent: _Count | None = Field(default=None, description="Requests in work at the same time.")


class ApiKey(EdgeModel):
    """What is kept of a key."""

    name: Annotated[Identifier, Field(description="Whose it is; stands in logs and metrics.")]
    hash: Annotated[str, AfterValidator(_check_hash), Field(description="Of the key: sha256: and 64 hex digits.")]
    admin: bool = Field(default=False, description="May use /admin.")
    limits: RateLimits | None = Field(default=None, description="Instead of the limits that all keys have.")


def new_key(name: str, *, admin: bool = False, limits: RateLimits | None = None) -> tuple[str, ApiKey]:
    """A fresh key, to be shown once, and what to keep of it."""
    key = _PREFIX + secrets.token_urlsafe(_NUM_BYTES)
    return key, key_of(key, name=name, admin=admin, limits=limits)


def key_of(
    key: str, *, name: str, admin: bool = False, limits: RateLimits | None = None, what: str = "the key"
) -> ApiKey:
    """What to keep of a key that exists. Raises `InvalidArgumentError` for one that could be guessed."""
    if len(key) < _MIN_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidArgumentError(
            f"{what} must have at least {_MIN_CHARS} visible ASCII characters; let `sage-llm key new` make one",
            field="key",
        )
    return ApiKey(name=name, hash=hash_of(key.encode()), admin=admin, limits=limits)


def hash_of(key: bytes) -> str:
    """The text that a key is kept as."""
    return "sha256:" + hashlib.sha256(key).hexdigest()


def read_keys(path: Path) -> list[ApiKey]:
    """The keys in a key file; none if there is no such file. Raises `InvalidArgumentError` that names the file."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except FileNotFoundError:
        return []
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"the key file {path} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise InvalidArgumentError(f"the key file {path} must hold a list of keys, each with name and hash")
    return [parse(ApiKey, entry, what=f"key {number} of {path}") for number, entry in enumerate(entries, 1)]


def add_key(path: Path, key: ApiKey) -> None:
    """Add a key to a key file, which only its owner may read. Raises `InvalidArgumentError` for a name it has."""
    keys = read_keys(path)
    if any(known.name == key.name for known in keys):
        raise InvalidArgumentError(f"{path} has a key named {key.name!r}; revoke it or choose another name")
    _write(path, [*keys, key])


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of a key file. Raises `InvalidArgumentError` for a name it doesn't have."""
    keys = read_keys(path)
    if not any(key.name == name for key in keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise InvalidArgumentError(f"{path} has no key named {name!r}; it has {known}", field="name")
    _write(path, [key for key in keys if key.name != name])


def _write(path: Path, keys: list[ApiKey]) -> None:
    import yaml

    entries: list[dict[str, Any]] = [key.model_dump(mode="json", exclude_defaults=True) for key in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        yaml.safe_dump(entries, file, sort_keys=False, allow_unicode=True)
    draft.replace(path)  # at once: a reader sees the old list or the new one
