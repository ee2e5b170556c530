"""The command tree: help, version, wrong use; and that none of it costs time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli_process import Cli, environment, run_process
from sagellm.cli import app
from sagellm_core.version import __version__

COMMANDS = ("run", "chat", "serve", "gateway", "ps", "stop", "info", "list", "pull", "install", "demo")


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"  {command} " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert CliRunner().invoke(app, [command, "-h"]).stdout == result.stdout


def test_the_version(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.status, outcome.out.strip()) == (0, __version__)


def test_without_a_command_the_help_is_shown(cli: Cli) -> None:
    outcome = cli()
    assert outcome.status == 2
    assert "Usage:" in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["run", "--tempature", "1"], "No such option: --tempature"),
        (["run", "--top-k", "many"], "Invalid value for '--top-k'"),
        (["serve", "--port", "99999"], "Invalid value for '--port'"),
        (["pull"], "Missing argument 'model'"),
        (["run", "-p"], "Option '-p' requires an argument"),
    ],
)
def test_wrong_use_is_one_line(cli: Cli, arguments: list[str], words: str) -> None:
    outcome = cli(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error [invalid_argument]: ")
    assert outcome.err.count("\n") == 1
    assert words.lower() in outcome.err.lower()
    assert "--help" in outcome.err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom sagellm.cli import app\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'sagellm_protocol.model', 'fastapi', 'rich.table', 'yaml'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def test_help_is_instant(home: Path) -> None:
    command = [sys.executable, "-m", "sagellm", "--help"]
    durations = []
    for _ in range(5):
        started_at, cpu_before_s = time.perf_counter(), children_cpu_s()
        subprocess.run(command, env=environment(home), stdout=subprocess.DEVNULL, check=True)
        if time.perf_counter() - started_at < 0.3:
            return
        durations.append(children_cpu_s() - cpu_before_s)
    # On a machine that is busy with something else the clock says nothing, and the time of the processor most.
    assert min(durations) < 0.6, durations


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sagellm_core.engine_server", "sagellm_gateway.command", "sagellm_core.demo"])
def test_the_other_commands_fail_in_one_line_too(module: str, home: Path) -> None:
    outcome = run_process(["--no-such-option"], home, module=module)
    assert outcome.status == 2
    assert outcome.err.startswith("error [invalid_argument]: No such option")
    assert outcome.err.count("\n") == 1
