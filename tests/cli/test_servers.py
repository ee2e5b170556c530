"""`ps`, `stop`, `chat --url`, `run --url` and `gateway --config`, with servers in processes of their own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from cli_process import Cli, environment, run_process, server, wait_until_idle
from sagellm.cli.servers import format_duration
from sagellm_core.server_registry import list_servers, registry_folder
from terminal import Terminal

EXAMPLE = Path(__file__).parents[2] / "examples" / "gateway.yaml"
KEY = "sk-sage-0123456789abcdefghij"


@contextmanager
def foreign_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user that is no server."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- ps and stop --------------------------------------------------------------------------------------


def test_without_servers(cli: Cli) -> None:
    outcome = cli("ps")
    assert (outcome.status, outcome.out) == (0, "")
    assert "No server of yours runs" in outcome.err
    assert cli("ps", "--json").out.strip() == "[]"
    assert cli("stop", "--all").status == 0
    for arguments in ((), ("builtin",)):
        outcome = cli("stop", *arguments)
        assert outcome.status == 1
        assert outcome.err.startswith("error [not_found]: no server of yours")
    assert cli("stop", "builtin", "--all").status == 2


def test_a_process_that_took_over_an_id_is_never_signalled(cli: Cli) -> None:
    """The file names a living process of this user, but neither its start nor its command."""
    with foreign_process() as process:
        started_s = psutil.Process(process.pid).create_time() - psutil.boot_time()
        for start, command_hash in ((started_s, "0" * 64), (started_s - 100, "0" * 64)):
            registry_folder().mkdir(parents=True, exist_ok=True)
            record = {
                "name": "old",
                "kind": "gateway",
                "url": "http://127.0.0.1:9",
                "models": ["m"],
                "pid": process.pid,
                "started_s": start,
                "command_hash": command_hash,
                "since": time.time(),
            }
            (registry_folder() / "old.json").write_text(json.dumps(record), encoding="utf-8")
            for which in ("old", str(process.pid), "9"):
                assert cli("stop", which).status == 1
            assert cli("stop", "--all").status == 0
        time.sleep(0.2)
        assert process.poll() is None


@pytest.mark.slow
def test_two_servers_are_listed_and_stopped_by_name_and_port(cli: Cli, home: Path) -> None:
    with server(["serve"], home) as first, server(["serve", "--engine-only"], home) as second:
        rows = json.loads(cli("ps", "--json").out)
        assert [row["name"] for row in rows] == ["builtin", "builtin-2"]
        assert [row["kind"] for row in rows] == ["gateway", "engine"]
        assert [row["url"] for row in rows] == [first.url, second.url]
        assert [row["pid"] for row in rows] == [first.process.pid, second.process.pid]
        for row in rows:
            assert (row["state"], row["num_requests"], row["models"]) == ("ok", 0, ["builtin"])
            assert 0 <= row["uptime_s"] < 90
        table = cli("ps").out
        assert first.url in table
        assert second.url in table

        undecided = cli("stop")
        assert undecided.status == 2
        assert "several servers run: builtin (port " in undecided.err
        unknown = cli("stop", "nothing")
        assert unknown.status == 1
        assert "running: builtin, builtin-2" in unknown.err
        assert first.process.poll() is second.process.poll() is None

        outcome = cli("stop", second.url.rpartition(":")[2])
        assert outcome.status == 0
        assert f"Stopped builtin-2 ({second.url}, pid {second.process.pid}) after" in outcome.err
        assert second.process.wait(timeout=30) == 0
        assert first.process.poll() is None
        assert cli("stop", "builtin").status == 0
        assert first.process.wait(timeout=30) == 0
    assert list_servers() == []


@pytest.mark.slow
def test_all_are_stopped_at_once_and_names_can_be_chosen(cli: Cli, home: Path) -> None:
    with server(["serve", "--name", "one"], home) as first, server(["gateway", "--name", "two"], home) as second:
        assert [record.name for record in list_servers()] == ["one", "two"]
        outcome = cli("stop", "--all")
        assert outcome.status == 0
        assert "Stopped one" in outcome.err
        assert "Stopped two" in outcome.err
        assert first.process.wait(timeout=30) == second.process.wait(timeout=30) == 0


@pytest.mark.slow
def test_a_killed_server_is_forgotten(cli: Cli, home: Path) -> None:
    with server(["serve"], home) as process:
        assert len(list_servers()) == 1
        process.process.send_signal(signal.SIGKILL)
        process.process.wait()
        assert cli("ps", "--json").out.strip() == "[]"
        assert list(registry_folder().glob("*.json")) == []


@pytest.mark.slow
def test_stop_waits_for_answers_in_flight_and_a_second_one_cuts_them_off(
    cli: Cli, home: Path, endless_model: Path
) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me a story"}], "stream": True}
    serve = ["serve", "--model", str(endless_model), "--max-model-len", "60000", "--name", "endless"]
    with server(serve, home) as process:
        lines: list[str] = []

        def read(max_tokens: int) -> None:
            call = {**body, "max_tokens": max_tokens}
            with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=call, timeout=60) as answer:
                lines.extend(answer.iter_lines())

        reader = threading.Thread(target=read, args=(1000,))
        reader.start()
        while (json.loads(cli("ps", "--json").out) or [{}])[0].get("num_requests") != 1:
            assert reader.is_alive()
        outcome = cli("stop", "endless")
        reader.join(timeout=60)
        assert outcome.status == 0, outcome.err
        assert "data: [DONE]" in lines
        assert process.process.wait(timeout=30) == 0

    with server(serve, home) as process:
        with httpx.stream(
            "POST", f"{process.url}/v1/chat/completions", json={**body, "max_tokens": 50000}, timeout=60
        ) as answer:
            parts = answer.iter_lines()  # kept: a client that drops it has gone away
            next(parts)
            late = cli("stop", "endless", "--timeout", "1")
            assert late.status == 1
            assert "still ending after 1 s: endless" in late.err
            assert cli("stop", "endless").status == 0
        assert process.stop(signal.SIGTERM) == 0
        assert "Traceback" not in "".join(process.log)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7300, "2 h 1 min"), (200000, "2 d 7 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# ---- asking a server ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_chat_and_run_with_a_server(cli: Cli, home: Path) -> None:
    with server(["serve", "--api-key", KEY], home) as process:
        own = cli("run", "-p", "What is LLM inference?", "-n", "40")
        asked = ("--url", process.url + "/v1/", "--api-key", KEY)
        outcome = cli("run", "-p", "What is LLM inference?", "-n", "40", *asked)
        assert outcome.status == 0, outcome.err
        assert outcome.out == own.out
        for word in ("tokens", "first token", "tokens/s"):
            assert word in outcome.err
        body = json.loads(cli("run", "-p", "Hi", "-n", "4", "--json", "--preset", "deterministic", *asked).out)
        assert body["usage"]["completion_tokens"] == 4
        raw = cli("run", "-p", "Once upon", "-n", "5", "--raw", *asked)
        assert raw.out == cli("run", "-p", "Once upon", "-n", "5", "--raw").out

        lines = ["Who are you?", "/clear", "What is LLM inference?", "And what is a KV cache?", "/exit", "never asked"]
        talk = cli("chat", "--system", "Be brief.", "-n", "16", *asked, stdin="\n".join(lines))
        assert talk.status == 0
        assert len(talk.out.splitlines()) == 3
        assert f"Chat with builtin at {process.url}." in talk.err
        assert talk.err.count("first token") == 3

        # The oldest turns go when the server says that the conversation is too long for its model.
        long = cli("chat", "-n", "8", *asked, stdin="\n".join(["word " * 400] * 4 + ["word " * 1500]))
        assert long.err.count("first token") == 4
        assert "error [invalid_argument]: the prompt is too long" in long.err

        for wrong, code, words in (
            (("--url", process.url), "unauthenticated", "required; give one with --api-key"),
            (("--url", process.url, "--api-key", "sk-no-such-key-at-all-here"), "unauthenticated", "not known"),
            ((*asked, "--model", "other"), "not_found", "'other'"),
            ((*asked, "--temperature", "-1"), "invalid_argument", "temperature must be >= 0"),
            ((*asked, "--backend", "cpu"), "invalid_argument", "--backend is for an engine of this process"),
            ((*asked, "--max-model-len", "9"), "invalid_argument", "--max-model-len is for an engine"),
            (("--url", "localhost:8000"), "invalid_argument", "is no address"),
            (("--url", "http://127.0.0.1:9"), "unavailable", "no server answers at http://127.0.0.1:9"),
        ):
            outcome = cli("run", "-p", "Hi", *wrong)
            assert outcome.status == (2 if code == "invalid_argument" else 1)
            assert outcome.err.startswith(f"error [{code}]: ")
            assert words in outcome.err


@pytest.mark.slow
def test_ctrl_c_ends_a_servers_answer_and_not_the_conversation(home: Path, endless_model: Path) -> None:
    serve = ["serve", "--model", str(endless_model), "--max-model-len", "60000", "--name", "endless"]
    with server(serve, home) as process:
        terminal = Terminal(["chat", "--url", process.url, "-n", "50000"], home)
        try:
            terminal.wait_for("Chat with")
            terminal.wait_for("> ")
            for _ in range(2):
                terminal.send("Tell me a story\n")
                terminal.wait_for("story")
                terminal.wait_for(" the ")
                terminal.send("\x03")
                terminal.wait_for("(stopped)", timeout_s=60)
                terminal.wait_for("> ")
            wait_until_idle(process.url)  # the server notices that its client has gone
            terminal.send("\x04")
            assert terminal.process.wait(timeout=30) == 0
        finally:
            terminal.close()


def test_chat_with_a_server_starts_without_an_engine(home: Path) -> None:
    code = (
        "import sys\nsys.argv = ['sage-llm', 'chat', '--url', 'http://127.0.0.1:9', '--model', 'm']\n"
        "from sagellm.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'numpy', 'fastapi', 'httpx', 'rich', 'asyncio', 'sagellm_protocol.model'}\n"
        "    print(*sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"
    assert "Chat with m at http://127.0.0.1:9." in done.stderr


# ---- serving ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_panel_in_a_terminal(home: Path) -> None:
    terminal = Terminal(["serve", "--port", "0", "--access-log", "off"], home, TERM="xterm-256color", COLUMNS="100")
    try:
        panel = terminal.wait_for("curl http://127.0.0.1:")
        for words in ("sageLLM", "url", "model", "LlamaForCausalLM", "device", "weights +", "KV cache", "context"):
            assert words in panel
        assert "none needed; only this machine can call" in panel
        assert "sage-llm stop builtin" in panel
        terminal.send("\x03")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


@pytest.mark.slow
def test_a_file_with_two_models_and_a_key(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    options = "{kv_cache_memory_bytes: 33554432, max_model_len: 256}"
    file.write_text(
        f"engines:\n  - {{model: a, model_path: builtin, options: {options}}}\n"
        f"  - {{model: b, model_path: builtin, options: {options}}}\n"
        "default_model: b\nlimits: {per_key: {requests_per_minute: 3}}\nserver: {grace_s: 5}\n",
        encoding="utf-8",
    )
    call = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    with server(["gateway", "--config", str(file), "--api-key", KEY], home) as process:
        log = "".join(process.log)
        url = f"{process.url}/v1/chat/completions"
        assert httpx.post(url, json=call).status_code == 401
        with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
            assert client.post(url, json={**call, "model": "a"}).json()["model"] == "a"
            assert client.post(url, json={**call, "model": "default"}).json()["model"] == "b"
            assert client.post(url, json={**call, "model": "c"}).status_code == 404
            assert client.post(url, json=call).status_code == 429
        while "try:" not in log:
            log = "".join(process.log)
        assert "Serving a, b at" in log
        assert "keys: 1 key; calls need one" in log
        assert '-H "Authorization: Bearer $SAGELLM_API_KEY"' in log
        (record,) = list_servers()
        assert (record.name, record.models) == ("a", ["a", "b"])
        assert process.stop(signal.SIGTERM) == 0


@pytest.mark.slow
def test_the_example_serves_its_models(home: Path) -> None:
    with server(["gateway", "--config", str(EXAMPLE)], home) as process:
        names = {card["id"] for card in httpx.get(f"{process.url}/v1/models").json()["data"]}
        assert names == {"builtin", "builtin-int8"}
        for name in names:
            call = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            assert httpx.post(f"{process.url}/v1/chat/completions", json=call, timeout=30).status_code == 200
        assert process.stop(signal.SIGTERM) == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_server_with_tls_is_listed_and_stopped(cli: Cli, home: Path, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=somewhere.example"
    subprocess.run([*make.split(), "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    with server(["serve", "--tls-cert", str(cert), "--tls-key", str(key)], home) as process:
        (row,) = json.loads(cli("ps", "--json").out)
        assert row["url"] == process.url
        assert process.url.startswith("https://127.0.0.1:")
        assert row["state"] == "ok"
        refused = cli("run", "-p", "Hi", "--url", process.url)  # only `ps` need not look at certificates
        assert refused.status == 1
        assert "certificate" in refused.err.lower()
        assert cli("stop").status == 0


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sagellm", "sagellm_gateway.command"])
def test_a_bad_file_is_one_line(home: Path, tmp_path: Path, module: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("engines:\n  - model: builtin\n    kindd: cpu\n", encoding="utf-8")
    command = ["gateway"] if module == "sagellm" else []
    outcome = run_process([*command, "--config", str(file)], home, module=module)
    assert outcome.status == 2
    assert outcome.err == (
        f"error [invalid_argument]: {file}, line 3: 'kindd' is not a field of engines[0]; did you mean 'kind'?\n"
    )


def test_what_needs_the_gateway_is_refused_without_it(cli: Cli) -> None:
    outcome = cli("serve", "--engine-only", "--api-key", KEY)
    assert outcome.status == 2
    assert "--api-key is for the gateway" in outcome.err


@pytest.mark.parametrize("flags", [[], ["--engine-only"]])
def test_a_network_without_a_key_is_refused(cli: Cli, flags: list[str]) -> None:
    outcome = cli("serve", *flags, "--host", "0.0.0.0", "--port", "0", "--model", "builtin")
    assert outcome.status == 2
    assert "no key is needed" in outcome.err.splitlines()[-1]
    assert "--allow-no-key" in outcome.err.splitlines()[-1]


@pytest.mark.slow
def test_serve_is_ready_soon(home: Path) -> None:
    """Less than 5 s with the built-in model."""
    durations = []
    for _ in range(3):
        started_at = time.perf_counter()
        with server(["serve"], home) as process:
            if time.perf_counter() - started_at < 5:
                return
            times = psutil.Process(process.process.pid).cpu_times()
            durations.append(times.user + times.system)
    # On a machine that is busy with something else the clock says nothing, and the time of the processor most.
    assert min(durations) < 5, durations
