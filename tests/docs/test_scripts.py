"""The scripts at the repository's root: executable, well-formed, and they say what they do."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = (".ci/run", "quickstart.sh")


def run(*command: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_executable_bash(script: str) -> None:
    file = REPOSITORY / script
    assert os.access(file, os.X_OK)
    assert "\nset -euo pipefail\n" in file.read_text(encoding="utf-8")
    assert run("bash", "-n", script).returncode == 0


def test_quickstart_explains_itself_from_anywhere(tmp_path: Path) -> None:
    done = run(str(REPOSITORY / "quickstart.sh"), "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--standard", "--dev", "--help"):
        assert option in done.stdout
    assert not list(tmp_path.iterdir())


def test_quickstart_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = run(str(REPOSITORY / "quickstart.sh"), "--standrad", cwd=tmp_path)
    assert done.returncode == 1
    assert "unknown option --standrad" in done.stderr


def test_the_makefile_calls_what_is_there() -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    files = re.findall(r"(?<![\w$(/])((?:benchmarks|tools|\.ci|\./)[\w./-]+)", text)
    assert files
    for name in files:
        assert (REPOSITORY / name).is_file(), name


def test_the_hooks_and_the_makefile_check_the_same() -> None:
    hooks = re.findall(r"entry: ([\w-]+)", (REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    check = (REPOSITORY / "Makefile").read_text(encoding="utf-8").partition("\ncheck:")[2].partition("\n\n")[0]
    assert set(hooks) == set(re.findall(r"\$\(BIN\)/([\w-]+)", check))
