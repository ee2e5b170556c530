"""`sage-llm key`: API keys for `serve` and `gateway`, kept as hashes in `~/.sage-llm/keys.yaml`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

key = typer.Typer(
    help="Make, list and revoke the API keys of this machine's gateway.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="Whose key it is; stands in logs and metrics.")]


def key_file() -> Path:
    """Where the keys lie; `SAGELLM_KEYS` names another file."""
    from sagellm_gateway.keys import KEYS_FILE

    return Path(os.environ.get("SAGELLM_KEYS") or KEYS_FILE).expanduser()


@key.command("new")
def new_command(
    name: Name,
    admin: Annotated[bool, typer.Option("--admin", help="May use /admin, too.")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="Of this key.", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Of this key: prompts and answers.", min=1)] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests in work at the same time.", min=1)] = None,
) -> None:
    """Make a key and print it, once.

    From its next start on the gateway answers only those who send a key.
    """
    from sagellm_core.command import print_quietly
    from sagellm_gateway.keys import RateLimits, add_key, new_key

    limits = RateLimits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, max_concurrent=max_concurrent
    )
    secret, kept = new_key(name, admin=admin, limits=None if limits == RateLimits() else limits)
    file = key_file()
    add_key(file, kept)
    print(secret)
    print_quietly(f"Keep it: {file} holds only its hash. Clients send it as `Authorization: Bearer {secret[:8]}…`")


@key.command("list")
def list_command() -> None:
    """List the keys' names."""
    from sagellm_gateway.keys import read_keys

    for kept in read_keys(key_file()):
        print(kept.name + (" (admin)" if kept.admin else ""))


@key.command("revoke")
def revoke_command(name: Name) -> None:
    """Take a key away; a running gateway forgets it with its next start."""
    from sagellm_gateway.keys import revoke_key

    revoke_key(key_file(), name)
