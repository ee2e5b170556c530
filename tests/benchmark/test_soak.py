"""A minute of `benchmarks/soak.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_process import environment

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_nothing_leaks_and_nothing_fails(tmp_path: Path) -> None:
    found = tmp_path / "soak.json"
    # In its first minute a process still makes what it makes once; 15 minutes tell of small leaks.
    command = [sys.executable, str(SOAK), "--minutes", "1", "--max-slope", "25", "--json", str(found)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(found.read_text(encoding="utf-8"))
    assert result["problems"] == []
    assert result["num_left"] > 0
    assert len(result["answered"]) > 50
    assert result["after"]["num_requests"] == result["after"]["num_used_blocks"] == 0
