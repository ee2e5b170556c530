from __future__ import annotations

from pathlib import Path

import pytest

from sagellm_benchmark.traces import TraceRequest, read_trace
from sagellm_protocol import InvalidArgumentError, NotFoundError


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "trace"
    file.write_text(text, encoding="utf-8")
    return file


def test_mooncake(tmp_path: Path) -> None:
    trace = write(
        tmp_path,
        '{"timestamp": 500, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}\n'
        '{"timestamp": 1500, "input_length": 0, "output_length": 7, "hash_ids": []}\n',
    )
    assert read_trace(trace) == [TraceRequest(0.0, 700, 5, (0, 1)), TraceRequest(1.0, 1, 7)]
    assert len(read_trace(trace, 1)) == 1


def test_azure(tmp_path: Path) -> None:
    trace = write(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.0799600,110,27\n",
    )
    assert read_trace(trace) == [TraceRequest(0.0, 4808, 10), TraceRequest(1.1, 110, 27)]


def test_lengths_alone(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, "input_chars,output_tokens\n3426,275\n")) == [TraceRequest(None, 856, 275)]


def test_scaling_keeps_what_is_shared() -> None:
    assert TraceRequest(1.0, 1024, 100, (4, 5)).scaled(0.125) == TraceRequest(1.0, 128, 12, (4, 5), 64)
    assert TraceRequest(1.0, 3, 1).scaled(0.01) == TraceRequest(1.0, 1, 1, (), 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 1}', "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2"),
        ("input_chars,output_tokens\n1,many\n", "line 2"),
        ("a,b\n1,2\n", "no trace that is known"),
        ("", "no trace that is known"),
        ("input_chars,output_tokens\n", "holds no request"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_trace(write(tmp_path, text))


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no trace"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "count", "has_times"),
    [
        ("conversation_trace.jsonl", 12_031, True),
        ("AzureLLMInferenceTrace_code.csv", 8_819, True),
        ("lengths/sharegpt_lmbenchmark_252.csv", 252, False),
    ],
)
def test_the_published_traces(shared: Path, name: str, count: int, has_times: bool) -> None:
    trace = read_trace(shared / "traces" / name)
    assert len(trace) == count
    assert all((entry.at_s is not None) == has_times for entry in trace)
    assert all(len(entry.block_ids) == -(-entry.input_len // 512) for entry in trace if entry.block_ids)
