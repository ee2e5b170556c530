"""`sage-llm bench`."""

from __future__ import annotations

import json
from pathlib import Path

from cli_process import Cli

SHORT = ("--input-len", "8", "--output-len", "4", "--runs", "1", "--warmup", "0", "--num-threads", "1")


def test_latency(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    # Long enough that the two are sure to decode together.
    outcome = cli("bench", "latency", *SHORT, "--output-len", "64", "--batch-size", "2", "--json", str(file))
    assert outcome.status == 0, outcome.err
    for words in ("2 at a time, 8 → 64 tokens", "time to first token", "between two tokens", "decode only, tokens/s"):
        assert words in outcome.out
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["benchmark"] == "latency"
    assert data["load"]["concurrency"] == 2
    assert data["ttft_ms"]["p99"] > 0


def test_throughput(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    outcome = cli("bench", "throughput", *SHORT, "--requests", "5", "--concurrency", "2", "--json", str(file))
    assert outcome.status == 0, outcome.err
    assert "5 requests, 2 at a time" in outcome.out
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["engine"]["max_batch_size"] == 2
    assert data["requests_per_second"] > 0


def test_quantized_weights(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "int8.json"
    outcome = cli("bench", "latency", *SHORT, "--quantization", "int8", "--json", str(file))
    assert outcome.status == 0, outcome.err
    assert json.loads(file.read_text(encoding="utf-8"))["output_tokens_per_second"] > 0


def test_kernels(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    chosen = ("--shape", "builtin", "--op", "linear", "--op", "rms_norm", "--format", "int4", "--rows", "1")
    outcome = cli("bench", "kernels", *chosen, "--seconds", "0.001", "--json", str(file))
    assert outcome.status == 0, outcome.err
    assert "gate_up 1280x256 int4, 1 rows" in outcome.out
    assert "limits of this machine" in outcome.out
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert {result["op"] for result in results} == {"linear", "rms_norm"}


def test_wrong_arguments(cli: Cli, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none" / "x.json")
    outcome = cli("bench", "latency", "--json", nowhere)
    assert outcome.status == 2
    assert "there is no folder" in outcome.err
    assert cli("bench", "latency", "--runs", "0").status == 2
    outcome = cli("bench", "kernels", "--shape", "builtin", "--op", "nothing")
    assert outcome.status == 2
    assert "no op 'nothing'" in outcome.err
