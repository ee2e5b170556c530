"""The conversation in the terminal, whoever answers: an engine of this process or a server.

Lines are read in the main thread while nothing else runs, so that line editing and Ctrl-C work as in a shell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sagellm.cli.session import system_messages
from sagellm_core.command import print_quietly

_HELP = "/clear forgets the conversation, /help shows this, /exit or Ctrl-D leaves, Ctrl-C ends an answer."

Messages = list[dict[str, Any]]


def converse(who: str, answer: Callable[[Messages], str], system: str | None) -> None:
    """Read, answer, repeat. `answer` prints what is said to a conversation until its end or Ctrl-C, and returns it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and history
    print_quietly(f"Chat with {who}. {_HELP}")
    messages = system_messages(system)
    while (text := _read_line()) is not None:
        command = text.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/help":
            print_quietly(_HELP)
        elif command == "/clear":
            messages = system_messages(system)
            print_quietly("The conversation starts anew.")
        elif command:
            messages.append({"role": "user", "content": text})
            said = answer(messages)
            if said:
                messages.append({"role": "assistant", "content": said})
            else:
                messages.pop()  # nothing was said: as if it had not been asked


def _read_line() -> str | None:
    """The user's next line; None at the end. Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()


def without_oldest_turn(messages: Messages) -> Messages | None:
    """A conversation that has become too long, shorter; the system message stays. None if only a question is left."""
    num_kept = 1 if messages[0]["role"] == "system" else 0
    return [*messages[:num_kept], *messages[num_kept + 2 :]] if len(messages) > num_kept + 2 else None


def report_stop() -> None:
    """Say that Ctrl-C ended an answer."""
    print(flush=True)
    print_quietly("(stopped)")


def report_error(code: str, message: str) -> None:
    """Say why there is no (more) answer; the conversation goes on."""
    print(flush=True)
    print_quietly(f"error [{code}]: {message}")
