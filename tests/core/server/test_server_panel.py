"""What a server says of itself when it is ready."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sagellm_core.server_panel import ServerPanel, engine_rows, format_bytes, url_to_call

INFO: dict[str, Any] = {
    "model": "small",
    "architecture": "LlamaForCausalLM",
    "weight_formats": {"bf16": 2, "int4": 24},
    "weight_bytes": 3 * 2**30,
    "device": "cpu",
    "device_name": "A Processor",
    "kernels": {"linear": "native[avx2]"},
    "kv_blocks": 1000,
    "kv_block_size": 16,
    "kv_bytes_per_token": 65536,
    "max_model_len": 4096,
    "max_batch_size": 8,
}


def test_one_engine_is_told_in_full() -> None:
    assert engine_rows([INFO]) == [
        ("model", "small · LlamaForCausalLM · int4 and bf16"),
        ("device", "cpu · A Processor · kernels native[avx2]"),
        ("memory", "3.0 GiB weights + 1000 MiB KV cache"),
        ("context", "4,096 tokens a request, 16,000 in the cache, 8 requests at a time"),
    ]


def test_each_of_several_engines_has_a_row() -> None:
    rows = engine_rows([INFO, {**INFO, "model": "other"}])
    assert [label for label, _ in rows] == ["small", "other"]
    assert "3.0 GiB weights" in rows[0][1]


def test_an_engine_that_says_little_is_no_error() -> None:
    rows = dict(engine_rows([{"model": "fake", "max_model_len": 10, "max_batch_size": 2}]))
    assert rows["model"] == "fake"
    assert rows["memory"] == "0.0 MiB weights"
    assert rows["context"] == "10 tokens a request, 2 requests at a time"


def test_without_a_terminal_it_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    ServerPanel(["small"], "http://127.0.0.1:1/v1", [("keys", "none needed")], "curl x").show()
    assert capsys.readouterr().err.splitlines() == [
        "Serving small at http://127.0.0.1:1/v1",
        "  keys: none needed",
        "  try: curl x",
    ]


def test_in_a_terminal_it_is_one_panel_and_a_line_to_copy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    example = "curl http://127.0.0.1:1/v1/chat/completions -d '{\"a\": [1]}' # longer than the terminal is wide"
    ServerPanel(["small"], "http://127.0.0.1:1/v1", [("device", "cpu [bold] · " + "x" * 60)], example).show()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err).splitlines()
    assert lines[0].startswith("╭─ sageLLM")
    assert lines[-1] == example
    assert lines[-2].startswith("╰")
    assert "[bold]" in "".join(lines)
    assert max(map(len, lines[:-1])) <= 50


def test_the_address_to_call() -> None:
    assert url_to_call("http://0.0.0.0:80") == "http://127.0.0.1:80"
    assert url_to_call("https://[::]:80") == "https://[::1]:80"
    assert url_to_call("http://10.0.0.1:80") == "http://10.0.0.1:80"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.0 MiB"), (10368000, "9.9 MiB"), (192 * 2**20, "192 MiB"), (5 * 2**30, "5.0 GiB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
