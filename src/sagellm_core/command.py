"""How commands end: failures as one line with code and remedy, a status other than 0, a traceback only with --debug.

Shared by `sage-llm`, `sage-engine` and `sage-gateway`. Imports nothing heavy, so that `--help` stays instant.
"""

from __future__ import annotations

import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

# Conventional statuses: 2 for wrong use, 130 for Ctrl-C, 1 for everything else.
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# The base of what typer raises for wrong options, whether it brings its own copy of click or uses the real one.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command line of this process and exit with its status; `--debug` counts wherever it stands."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if debug:
        logging.basicConfig(level=logging.DEBUG)
    try:
        status = app(args=arguments, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        status = EXIT_INTERRUPTED
    except typer.Exit as stop:
        status = stop.exit_code
    except _UsageError as error:
        status = _report_usage(error)
    except Exception as error:
        status = report(error, debug=debug)
    sys.exit(status if isinstance(status, int) else 0)


def run_command(function: Callable[..., None]) -> NoReturn:
    """As `run_app`, for a command without subcommands: `function` with typer's annotations."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    run_app(app)


def report(error: Exception, *, debug: bool) -> int:
    """Print the error to stderr in one line and return the exit status that fits it."""
    from sagellm_protocol import ErrorCode, SageLLMError

    if debug:
        traceback.print_exception(error)
    if isinstance(error, SageLLMError):
        print(f"error [{error.code.value}]: {error.message}", file=sys.stderr)
        return EXIT_USAGE if error.code is ErrorCode.INVALID_ARGUMENT else EXIT_FAILURE
    text = " ".join(str(error).split())
    hint = "" if debug else " (--debug shows where)"
    print(f"error [internal]: {type(error).__name__}{': ' if text else ''}{text}{hint}", file=sys.stderr)
    return EXIT_FAILURE


def print_quietly(text: str) -> None:
    """A remark on stderr, dimmed, so that pipes get the answer alone."""
    typer.secho(text, err=True, dim=True)


@contextmanager
def kept_from_collector() -> Iterator[None]:
    """For imports: importing torch makes 160,000 objects for good, and the collector would search them again and again.

    That takes up to half a second of the start, as much of the end, and a third of a second of every full collection.
    """
    if "torch" in sys.modules:  # imported by whoever called us, with garbage of theirs that is not to be kept
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _report_usage(error: Any) -> int:
    """Print what is wrong with the command line; without any argument that is the help text itself."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return EXIT_USAGE
    text = " ".join(message.split())
    command = "" if error.ctx is None else f"{error.ctx.command_path} "
    print(f"error [invalid_argument]: {text.rstrip('.')}; see {command}--help", file=sys.stderr)
    return EXIT_USAGE
