"""`sage-llm serve`, `gateway`, `sage-engine`, `sage-gateway` as processes."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest

from cli_process import Cli, run_process, server, wait_until_idle

pytestmark = pytest.mark.slow

HELLO = {"messages": [{"role": "user", "content": "What is LLM inference?"}], "max_tokens": 8}


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_stops_in_order(home: Path, signal_number: int) -> None:
    with server(["serve"], home) as process:
        answer = httpx.post(f"{process.url}/v1/chat/completions", json={"model": "builtin", **HELLO}, timeout=30)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"]
        assert httpx.get(f"{process.url}/v1/models").json()["data"][0]["id"] == "builtin"
        assert httpx.get(f"{process.url}/health").status_code == 200
        assert process.stop(signal_number) == 0
        log = "".join(process.log)
        assert "Stopped." in log
        assert "Traceback" not in log


def test_a_stream_is_finished_before_the_server_stops(home: Path, endless_model: Path) -> None:
    with server(["serve", "--model", str(endless_model)], home) as process:
        body = {**HELLO, "stream": True, "max_tokens": 200}
        lines = []
        with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=body, timeout=30) as answer:
            for line in answer.iter_lines():
                if not lines:
                    process.process.send_signal(signal.SIGTERM)
                lines.append(line)
        assert "data: [DONE]" in lines
        assert process.process.wait(timeout=30) == 0


def test_a_client_that_leaves_frees_its_request(home: Path, endless_model: Path) -> None:
    with server(["serve", "--model", str(endless_model), "--max-model-len", "60000"], home) as process:
        body = {**HELLO, "stream": True, "max_tokens": 50000}
        with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
        wait_until_idle(process.url)
        assert 'finish_reason="length"' not in httpx.get(f"{process.url}/metrics").text


def test_engine_only_serves_the_engines_own_api(home: Path) -> None:
    with server(["serve", "--engine-only"], home) as process:
        answer = httpx.post(
            f"{process.url}/v1/completions", json={"model": "builtin", "prompt": "The", "max_tokens": 3}
        )
        assert answer.status_code == 200
        assert httpx.get(f"{process.url}/info").json()["model"] == "builtin"
        assert httpx.post(f"{process.url}/v1/chat/completions", json=HELLO).status_code == 404
        assert process.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("module", "arguments", "path"),
    [
        ("sagellm", ["gateway"], "/v1/models"),
        ("sagellm_gateway.command", ["--model", "builtin"], "/v1/models"),
        ("sagellm_core.engine_server", ["--host", "127.0.0.1"], "/info"),
    ],
)
def test_the_other_servers(home: Path, module: str, arguments: list[str], path: str) -> None:
    with server(arguments, home, module=module) as process:
        assert "builtin" in httpx.get(f"{process.url}{path}").text
        assert process.stop(signal.SIGTERM) == 0


@pytest.mark.parametrize("module", ["sagellm", "sagellm_gateway.command", "sagellm_core.engine_server"])
def test_a_model_that_is_not_there_is_one_line(home: Path, module: str) -> None:
    command = ["serve"] if module == "sagellm" else []
    outcome = run_process([*command, "--model", "/no/such/folder", "--port", "0"], home, module=module)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1].startswith("error [not_found]: /no/such/folder")
    assert "Traceback" not in outcome.err


def test_a_taken_port_is_said_before_the_model_is_loaded(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        outcome = cli("serve", "--port", port, "--model", "/no/such/folder")
        assert outcome.status == 1
        expected = (
            f"error [unavailable]: cannot listen on 127.0.0.1:{port}: Address already in use; choose another port"
        )
        assert outcome.err.splitlines()[-1] == expected
    outcome = cli("serve", "--host", "no.such.host.invalid", "--allow-no-key", "--model", "/no/such/folder")
    assert outcome.status == 1
    assert "no address of this machine" in outcome.err.splitlines()[-1]
