"""`sage-llm simulate`: a table, JSON, and errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cli_process import environment


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sagellm", "simulate", *arguments]
    return subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False, timeout=60)


def test_a_table_of_the_routers_asked_for(tmp_path: Path) -> None:
    done = run(tmp_path, "--requests", "60", "--routing-policy", "random", "--routing-policy", "adaptive")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert lines[0][:2] == ["routing", "TTFT"]
    assert [line[0] for line in lines[2:]] == ["random", "adaptive"]


def test_json_of_a_recorded_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    entries = [
        {"timestamp": 100 * n, "input_length": 1024, "output_length": 20, "hash_ids": [n % 2, 2 + n % 2]}
        for n in range(40)
    ]
    trace.write_text("\n".join(json.dumps(entry) for entry in entries))
    done = run(tmp_path, "--trace", str(trace), "--engines", "2", "--scheduling-policy", "priority", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["trace"] == "trace.jsonl"
    assert told["config"]["num_engines"] == 2
    best = next(report for report in told["runs"] if report["router"] == "marginal_cost")
    assert (best["num_requests"], best["policy"]) == (40, "priority")
    assert best["hit_rate"] > 0.8


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    unknown = run(tmp_path, "--routing-policy", "fastest")
    assert unknown.returncode != 0
    assert "unknown routing_policy 'fastest'; choose one of" in unknown.stderr
    wrong = run(tmp_path, "--step-times", "1,2")
    assert "give five numbers of seconds" in wrong.stderr
