"""`info`, `list`, `pull`, `install`, `demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli_process import Cli
from sagellm.cli.install import TARGETS, command_for

# ---- info, list, pull ---------------------------------------------------------------------------------


def test_info_as_json(cli: Cli) -> None:
    outcome = cli("info", "--json")
    assert outcome.status == 0
    data = json.loads(outcome.out)
    assert data["devices"]["cpu"]["available"]
    assert data["chosen_backend"] in data["devices"]
    assert data["kernels"]["linear"]
    assert data["versions"]["torch"]
    assert data["models"][0]["name"] == "builtin"
    assert data["config"]["exists"] is False
    assert data["server"] is None
    for device in data["devices"].values():
        assert device["available"] or device["reason"]


def test_info_for_people(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_ENDPOINT", "http://127.0.0.1:9")
    outcome = cli("info")
    assert outcome.status == 0
    for word in ("Versions", "Devices", "Kernels", "Models", "builtin", "configuration:", "(not there: defaults)"):
        assert word in outcome.out
    assert "server: http://127.0.0.1:9 (not reachable" in outcome.out


def test_info_helps_where_the_configured_backend_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_BACKEND", "kunlun")
    data = json.loads(cli("info", "--json").out)
    assert data["configured_backend"]["kind"] == "kunlun"
    assert data["configured_backend"]["problem"] == data["devices"]["kunlun"]["reason"]
    assert data["devices"]["kunlun"]["reason"] in cli("info").out.replace("\n", " ")


def test_list(cli: Cli) -> None:
    rows = json.loads(cli("list", "--json").out)
    assert rows[0]["name"] == rows[0]["source"] == "builtin"
    assert rows[0]["num_bytes"] > 1_000_000
    assert Path(rows[0]["path"]).is_dir()
    assert "builtin" in cli("list").out


def test_pull(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("pull", "builtin")
    assert outcome.status == 0
    assert Path(outcome.out.strip()).is_dir()
    assert "sage-llm run -m builtin" in outcome.err
    missing = cli("pull", str(tmp_path / "none"))
    assert missing.status == 1
    assert missing.err.startswith("error [not_found]: ")
    assert cli("pull", "owner/name", "--source", "ftp").status == 2


# ---- install ------------------------------------------------------------------------------------------


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have run; pip itself never does."""
    calls: list[list[str]] = []

    def fake_run(command: list[str], **_: Any) -> SimpleNamespace:
        calls.append(command)
        return SimpleNamespace(returncode=1 if any("torch-npu" in part for part in command) else 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    return calls


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("from_github", [False, True])
def test_install_commands(target: str, from_github: bool) -> None:
    command = command_for(target, from_github=from_github)
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert any(part.startswith("isagellm") for part in command)
    assert any("git+https" in part for part in command) is from_github
    if target in ("cpu", "cuda"):
        assert "torch>=2.8,<2.14" in command
        assert command[-1].endswith("cpu" if target == "cpu" else "cu128")


def test_install_asks_before_it_runs(cli: Cli, pip_calls: list[list[str]]) -> None:
    outcome = cli("install", "cpu", stdin="n\n")
    assert outcome.status == 0
    assert "pip install" in outcome.out
    assert pip_calls == []
    assert cli("install", "cpu", stdin="y\n").status == 0
    assert cli("install", "cuda", "--github", "--yes").status == 0
    assert [call[3] for call in pip_calls] == ["install", "install"]


def test_install_without_an_answer_runs_nothing(cli: Cli, pip_calls: list[list[str]]) -> None:
    assert cli("install", "cpu", stdin="").status == 130
    assert pip_calls == []


def test_install_failures(cli: Cli, pip_calls: list[list[str]]) -> None:
    outcome = cli("install", "ascend", "--yes")
    assert outcome.status == 1
    assert "Needed first: CANN" in outcome.err
    assert "pip ended with status 1" in outcome.err
    unknown = cli("install", "tpu")
    assert unknown.status == 2
    assert "choose one of cpu, cuda, ascend, kunlun, haiguang" in unknown.err
    assert len(pip_calls) == 1


# ---- demo ---------------------------------------------------------------------------------------------


def test_demo_writes_the_metrics_of_every_request(cli: Cli, tmp_path: Path) -> None:
    workload, output = tmp_path / "w.yaml", tmp_path / "metrics.json"
    workload.write_text(
        "name: tiny\nscenarios:\n  - {name: one, num_requests: 2, prompt_tokens: 20, output_tokens: 5}\n"
        "  - {name: both, num_requests: 3, prompt_tokens: 30, output_tokens: 4, concurrency: 3}\n",
        encoding="utf-8",
    )
    outcome = cli("demo", "--workload", str(workload), "--output", str(output))
    assert outcome.status == 0, outcome.err
    data = json.loads(output.read_text(encoding="utf-8"))
    assert data["workload"]["name"] == "tiny"
    assert [scenario["num_requests"] for scenario in data["scenarios"]] == [2, 3]
    for scenario, lengths in zip(data["scenarios"], [(20, 5), (30, 4)], strict=True):
        for request in scenario["requests"]:
            assert (request["prompt_tokens"], request["output_tokens"]) == lengths
            assert request["metrics"]["ttft_ms"] > 0
            assert request["metrics"]["prefix_hit_rate"] == 0
        assert scenario["metrics"]["error_rate"] == 0
    assert "both" in outcome.out
    assert str(output) in outcome.err


def test_demo_failures(cli: Cli, tmp_path: Path) -> None:
    assert "neither a workload" in cli("demo", "--workload", "year9").err
    workload = tmp_path / "w.yaml"
    workload.write_text(
        "name: big\nscenarios: [{name: a, num_requests: 1, prompt_tokens: 5000, output_tokens: 5}]", encoding="utf-8"
    )
    outcome = cli("demo", "--workload", str(workload), "--output", str(tmp_path / "m.json"))
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith("error [invalid_argument]: the prompt is too long: this model's")
    outcome = cli("demo", "--workload", str(workload), "--output", str(tmp_path / "absent" / "m.json"))
    assert outcome.err.endswith(f"there is no folder {tmp_path / 'absent'}\n")  # said before minutes of work
