"""`sage-llm install`: the torch build that belongs to an accelerator, with pip, after a question."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass

import typer

from sagellm_core.command import print_quietly
from sagellm_protocol import InvalidArgumentError, UnavailableError

_TORCH = "torch>=2.8,<2.14"
_REPOSITORY = "git+https://github.com/intellistream/sagellm.git"


@dataclass(frozen=True)
class Target:
    """What one accelerator needs; `before` must be on the machine already."""

    packages: tuple[str, ...]
    index: str | None = None
    before: str = ""


TARGETS = {
    "cpu": Target((_TORCH,), "https://download.pytorch.org/whl/cpu"),
    "cuda": Target((_TORCH,), "https://download.pytorch.org/whl/cu128", "an NVIDIA driver for CUDA 12.8 or newer"),
    "ascend": Target(("torch==2.8.0", "torch-npu==2.8.0"), None, "CANN 8.2 or newer, its set_env.sh sourced"),
    "kunlun": Target((), None, "Baidu's XPU driver and its torch_xmlir wheel, which is not on the package index"),
    "haiguang": Target((), None, "Hygon's DTK and its torch wheel, which is not on the package index"),
}


def command_for(target: str, *, from_github: bool) -> list[str]:
    """The pip command for `target`; sageLLM itself comes from the package index or, if wanted, its repository."""
    if target not in TARGETS:
        raise InvalidArgumentError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}", field="target")
    chosen = TARGETS[target]
    program = f"isagellm @ {_REPOSITORY}" if from_github else "isagellm"
    command = [sys.executable, "-m", "pip", "install", *chosen.packages, program]
    return command if chosen.index is None else [*command, "--extra-index-url", chosen.index]


def install_command(target: str, *, from_github: bool, confirmed: bool) -> None:
    """Show the command, ask, run it."""
    command = command_for(target, from_github=from_github)
    before = TARGETS[target].before
    if before:
        print_quietly(f"Needed first: {before}.")
    print(shlex.join(command))
    if not confirmed and not typer.confirm("Run it now?", default=False):
        return
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise UnavailableError(f"pip ended with status {status}; its own message stands above")
