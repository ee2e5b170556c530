"""Every example runs, as its first lines say it is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_process import environment

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(name: str) -> str:
    return str(REPOSITORY / "examples" / name)


def test_the_demo_of_the_core(tmp_path: Path) -> None:
    out = run(tmp_path, "-m", "sagellm_core.demo", "--config", example("config_cpu.yaml"), "--verbose")
    assert "> What is LLM inference?" in out
    data = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    scenario = data["scenarios"][0]
    assert len(scenario["requests"]) == scenario["num_requests"] == 3
    assert scenario["metrics"]["throughput_tps"] > 0


def test_six_decoding_strategies(tmp_path: Path) -> None:
    out = run(tmp_path, example("decoding_strategies_demo.py"))
    assert [line[:2] for line in out.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5.", "6."]
    for word in ("[greedy,", "[sampling,", "[beam_search,", "[contrastive,"):
        assert word in out
    assert run(tmp_path, example("decoding_strategies_demo.py")) == out, "every scenario is reproducible"


def test_prefill_and_decode_apart(tmp_path: Path) -> None:
    lines = run(tmp_path, example("pd_separation_demo.py")).splitlines()
    assert len(lines) == 6
    for line in lines:
        assert ("prefill-1 -> decode-1 (" in line) == (int(line.split()[0]) >= 100)
        assert line.endswith("the same tokens")


def test_the_download_helper(tmp_path: Path) -> None:
    assert "builtin" in run(tmp_path, example("model_download_helper.py"))
    assert "LlamaForCausalLM" in run(tmp_path, example("model_download_helper.py"), "builtin")


def test_every_example_has_a_test() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    for file in (REPOSITORY / "examples").iterdir():
        # The CUDA configuration needs a GPU and a download; tests/core/demo checks that it is valid, and
        # tests/gateway/test_config_file.py serves the gateway's.
        if file.suffix in (".py", ".yaml") and file.name not in ("config_cuda.yaml", "gateway.yaml"):
            assert f'"{file.name}"' in tested, file.name
