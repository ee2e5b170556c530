"""A gateway as a process: how it ends, TLS, clients that are slow or send too much."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from cli_process import ServerProcess, run_process, server
from waiting import PATIENCE_S

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"


@contextmanager
def gateway(home: Path, **sections: Any) -> Iterator[ServerProcess]:
    with server([json.dumps(sections)], home, module="fake_gateway") as process:
        yield process


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields}


@contextmanager
def streaming(url: str, text: str, **fields: Any) -> Iterator[httpx.Response]:
    with httpx.stream("POST", url + CHAT, json=chat(text, stream=True, **fields)) as answer:
        assert answer.status_code == 200
        yield answer


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=10)


def ask(url: str, data: bytes) -> bytes:
    """What the server says until it closes the connection."""
    with connect(url) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def wait_until_closed_to_new_work(url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            connect(url).close()
        except OSError:
            return
        assert time.monotonic() < deadline, "the server still takes connections"
        time.sleep(0.05)


def test_a_signal_lets_streams_end_and_takes_nothing_new(tmp_path: Path) -> None:
    with gateway(tmp_path) as process:
        with streaming(process.url, "slow", max_tokens=40) as answer:
            chunks = answer.iter_lines()
            next(chunks)
            process.process.send_signal(signal.SIGTERM)
            wait_until_closed_to_new_work(process.url)
            rest = [line for line in chunks if line]
            assert len(rest) > 10
            assert rest[-1] == "data: [DONE]"
        assert process.process.wait(timeout=30) == 0
        assert not [line for line in process.log if "Traceback" in line]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_cuts_what_is_left(tmp_path: Path, second: int) -> None:
    with gateway(tmp_path) as process, streaming(process.url, "wait"):
        process.process.send_signal(signal.SIGTERM)
        wait_until_closed_to_new_work(process.url)
        assert process.process.poll() is None
        assert process.stop(second) == 0


def test_the_grace_period_ends(tmp_path: Path) -> None:
    with gateway(tmp_path, server={"grace_s": 0.3}) as process, streaming(process.url, "wait"):
        started_at = time.monotonic()
        assert process.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started_at < 20  # 30 s are the default


def test_a_load_balancer_gets_time_to_see_that_it_ends(tmp_path: Path) -> None:
    with gateway(tmp_path, server={"drain_delay_s": 60}) as process:
        process.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{process.url}/ready").status_code != 503:
            time.sleep(0.05)
        # What it is still sent is answered, and the connection is not for more.
        served = httpx.post(f"{process.url}{CHAT}", json=chat("hi"))
        assert (served.status_code, served.headers["connection"]) == (200, "close")
        assert process.stop(signal.SIGTERM) == 0  # which cuts the delay


def test_tls(tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {tmp_path}/key.pem -out {tmp_path}/cert.pem"
    subprocess.run(command.split(), check=True, capture_output=True)
    files = {"tls_cert": f"{tmp_path}/cert.pem", "tls_key": f"{tmp_path}/key.pem"}
    with gateway(tmp_path, server=files) as process:
        assert process.url.startswith("https://")
        trust = ssl.create_default_context(cafile=files["tls_cert"])
        assert httpx.post(f"{process.url}{CHAT}", json=chat("hi"), verify=trust).status_code == 200
    wrong = run_process(
        [json.dumps({"server": {**files, "tls_key": files["tls_cert"]}}), "--port", "0"],
        tmp_path,
        module="fake_gateway",
    )
    assert wrong.status != 0
    assert "are no certificate and key in PEM" in wrong.err


def test_it_does_not_listen_beyond_this_machine_without_a_key(tmp_path: Path) -> None:
    refused = run_process([json.dumps({"server": {"host": "0.0.0.0"}}), "--port", "0"], tmp_path, module="fake_gateway")
    assert refused.status != 0
    assert "no key is needed" in refused.err


def test_headers_that_are_too_large_or_too_slow(tmp_path: Path) -> None:
    with gateway(tmp_path, server={"max_header_bytes": 2048, "header_timeout_s": 2}) as process:
        head = b"GET /version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        assert b" 200 OK" in ask(process.url, head + b"x: " + b"y" * 1500 + b"\r\n\r\n")
        assert b" 431 " in ask(process.url, head + b"x: " + b"y" * 3000 + b"\r\n\r\n")
        assert b" 431 " in ask(process.url, b"GET /" + b"y" * 3000 + b" HTTP/1.1\r\n\r\n")
        with connect(process.url) as connection:  # one header without an end
            connection.sendall(head + b"x: ")
            with suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(100):
                    connection.sendall(b"y" * 1000)
                    time.sleep(0.01)
            assert b" 431 " in connection.recv(65536)
        assert b" 408 " in ask(process.url, head)
        assert ask(process.url, b"") == b""
        assert b" 400 " in ask(process.url, b"\x16\x03\x01\x02\x00 not HTTP\r\n\r\n")
        # A body of any length is no header.
        body = json.dumps(chat("hi " * 10_000)).encode()
        post = b"POST %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        assert b" 200 OK" in ask(process.url, post % (CHAT.encode(), len(body)) + body)


def test_a_body_that_does_not_come(tmp_path: Path) -> None:
    with gateway(tmp_path, server={"body_timeout_s": 1}) as process:
        head = (
            b"POST %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{" % CHAT.encode()
        )
        assert b" 408 " in ask(process.url, head)
        too_much = head.replace(b"100", b"99999999999999999999")
        assert b" 413 " in ask(process.url, too_much.replace(b"99999999999999999999", b"99999999999"))


def test_a_client_that_takes_nothing_of_its_answer_is_let_go(tmp_path: Path) -> None:
    with gateway(tmp_path, server={"send_timeout_s": 1}) as process:
        body = json.dumps(chat("hi", max_tokens=1_000_000, stream=True)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        with connect(process.url) as connection:
            connection.sendall(head + body)
            assert b" 200 OK" in connection.recv(64)
            assert num_running(process.url) == 1
            while num_running(process.url):
                time.sleep(0.1)


def num_running(url: str) -> int:
    engines = httpx.get(f"{url}/admin/stats").json()["engines"]
    return sum(engine["num_running"] for engine in engines)


def test_the_access_log_goes_to_standard_error(tmp_path: Path) -> None:
    with gateway(tmp_path, log={"access": "json"}, server={"trusted_proxies": ["127.0.0.1"]}) as process:
        proxied = {"x-forwarded-for": "203.0.113.9"}
        httpx.post(f"{process.url}{CHAT}", json=chat("my secret"), headers=proxied)
        process.stop(signal.SIGTERM)
        lines = [json.loads(line) for line in process.log if line.startswith("{")]
        assert [(line["status"], line["output_tokens"], line["client"]) for line in lines] == [(200, 3, "203.0.113.9")]
        assert not any("secret" in line for line in process.log)
