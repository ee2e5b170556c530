"""The `sage-llm` command: one subcommand a file, each imported only when it runs."""

from __future__ import annotations

from sagellm.cli.app import app, main

__all__ = ["app", "main"]
