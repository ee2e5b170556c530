"""`sage-llm plan`: a table, reasons, JSON; no weights are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_process import environment

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def run(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sagellm", "plan", *map(str, arguments)]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False, timeout=60)


def test_a_table_and_reasons(model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, model, "--gpus", "8xH200", "--ttft", "500", "--tpot", "50")
    assert done.returncode == 0, done.stderr
    assert "8.0 B parameters in bfloat16 on 8xH200" in done.stdout
    assert "DP8 " in done.stdout
    assert "chosen" in done.stdout
    assert "DP8 reaches " in done.stdout
    assert "GiB a device hold weights" in done.stdout


def test_json(model: Path, tmp_path: Path) -> None:
    arguments = ("--gpus", "4xA100", "--tpot", "30", "--strategy", "TP", "--weights", "int4", "--json")
    done = run(tmp_path, model / "config.json", *arguments)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["cluster"] == {"device": "A100", "num_devices": 4}
    assert plan["model"]["weight_dtype"] == "int4"
    assert {item["layout"]["dp"] for item in plan["estimates"]} == {1}
    assert plan["best"]["tpot_ms"] <= 30
    assert plan["explanation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8xH300"), "unknown device 'H300'; known are A10, A100,"),
        (("--gpus", "1xL4", "--input-tokens", "900000"), "does not fit on 1xL4"),
        (("--gpus", "8xH200", "--tpot", "-1"), "tpot_ms must be more than 0"),
        (("--gpus", "8xH200", "--strategy", "XP"), "strategies"),
        (("--gpus", "8xH200", "--hardware", "none.yaml"), "none.yaml can't be read"),
    ],
)
def test_errors_name_the_remedy(model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run(tmp_path, model, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path, "--gpus", "8xH200")
    assert "no config.json there" in done.stderr
