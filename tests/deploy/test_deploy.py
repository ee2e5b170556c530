"""The files in deploy/: that they parse, fit each other and the command line, and give nothing away."""

from __future__ import annotations

import configparser
import fnmatch
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from sagellm.cli import app
from sagellm_gateway.config_file import read_gateway_file

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"


def check_command_line(arguments: list[str]) -> None:
    """The arguments are such as `sage-llm` takes."""
    group = typer.main.get_command(app)
    name, *rest = arguments
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, rest)


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return content


def stages() -> list[list[tuple[str, str]]]:
    """The Dockerfile's instructions, a list for each stage."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = [[]]
    for line in whole.splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            found.append([])
        found[-1].append((instruction, re.sub(r"\s+", " ", rest).strip()))
    return found[1:]


def value_of(stage: list[tuple[str, str]], instruction: str) -> str:
    (value,) = (rest for name, rest in stage if name == instruction)
    return value


# ---- the configuration --------------------------------------------------------------------------------


def test_the_configuration_is_read_and_lets_answers_end() -> None:
    file, _ = read_gateway_file(DEPLOY / "gateway.yaml")
    assert file.server.host == "0.0.0.0"
    assert file.auth.allow_no_key is False
    grace_s = file.server.grace_s
    assert int(unit()["Service"]["TimeoutStopSec"]) > grace_s
    stop_grace = compose()["services"]["gateway"]["stop_grace_period"]
    assert int(stop_grace.removesuffix("s")) > grace_s


def test_what_stands_as_a_comment_is_read_too(tmp_path: Path) -> None:
    text = (DEPLOY / "gateway.yaml").read_text(encoding="utf-8")
    assert "# sessions: {store: redis" in text
    path = tmp_path / "gateway.yaml"
    path.write_text(text.replace("# sessions:", "sessions:"), encoding="utf-8")
    file, _ = read_gateway_file(path)
    assert file.sessions.url == f"redis://redis:{6379}/0"
    assert "redis" in compose()["services"]


# ---- the image ----------------------------------------------------------------------------------------


def test_the_image_runs_as_nobody_in_particular() -> None:
    *_, last = stages()
    user, _, group = value_of(last, "USER").partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000
    names = [name for name, _ in last]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "ADD" not in {name for stage in stages() for name, _ in stage}


def test_the_compiler_stays_behind() -> None:
    build, last = stages()
    assert any("build-essential" in rest for _, rest in build)
    assert not any("apt-get" in rest or "pip install" in rest for _, rest in last)
    for _, rest in build:
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest


def test_the_image_starts_what_the_command_line_knows() -> None:
    *_, last = stages()
    entry, command = json.loads(value_of(last, "ENTRYPOINT")), json.loads(value_of(last, "CMD"))
    assert entry == ["sage-llm"]
    check_command_line(command)
    copied = [rest.split() for name, rest in last if name == "COPY" and "--from" not in rest]
    assert ["deploy/gateway.yaml", command[-1]] in copied
    port = read_gateway_file(DEPLOY / "gateway.yaml")[0].server.port
    assert value_of(last, "EXPOSE") == str(port)


def test_what_is_copied_is_there_and_not_ignored() -> None:
    patterns = [
        line
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert patterns[0] == "*"
    kept = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    for stage in stages():
        for name, rest in stage:
            if name != "COPY" or "--from" in rest:
                continue
            for source in rest.split()[:-1]:
                source = source.removeprefix("./")
                assert (REPOSITORY / source).exists()
                assert source in kept


def test_what_the_build_needs_is_copied() -> None:
    """A missing licence or read-me ends the build, long after torch was fetched."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r"^license-files = (\[.*\])$", text, re.MULTILINE) + re.findall(
        r'^readme = (".*")$', text, re.M
    )
    needed = [name for entry in listed for name in ([json.loads(entry)] if entry[0] == '"' else json.loads(entry))]
    copied = {source.removeprefix("./") for name, rest in stages()[0] if name == "COPY" for source in rest.split()[:-1]}
    assert {"README.md", "LICENSE"} <= set(needed)
    assert {name.split("/")[0] for name in needed} | {"pyproject.toml", "CMakeLists.txt", "src", "csrc"} == copied


def test_versions_are_those_of_the_package() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    build = " ".join(rest for _, rest in stages()[0])
    (torch,) = re.findall(r'"(torch[^"]+)"', build)
    assert f'"{torch}"' in project
    extras = re.findall(r"\.\[([^\]]+)\]", build)[0].split(",")
    for extra in extras:
        assert f"\n{extra} = [" in project
    bases = {value_of(stage, "FROM").split()[0] for stage in stages()}
    assert bases == {"python:${PYTHON}-slim-bookworm"}


def test_only_public_hosts_are_named() -> None:
    hosts = set()
    for file in DEPLOY.iterdir():
        hosts |= set(re.findall(r"https?://([^/\s:\"')]+)", file.read_text(encoding="utf-8")))
    assert hosts <= {"download.pytorch.org", "github.com", "127.0.0.1", "localhost"}


class _Ready(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/ready" else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check(status: int | None, is_healthy: bool) -> None:
    check = value_of(stages()[-1], "HEALTHCHECK")
    program, option, code = json.loads(check[check.index("CMD ") + 4 :])
    assert (program, option) == ("python", "-c")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Ready,), {"status": status})) as server:
        if status is not None:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        code = code.replace("8000", str(server.server_address[1]))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=30)
        if status is not None:
            server.shutdown()
    assert (done.returncode == 0) is is_healthy


def test_the_health_check_asks_for_a_path_that_there_is() -> None:
    from sagellm_gateway.routes import ROUTERS

    assert "/ready" in {getattr(route, "path", None) for router in ROUTERS for route in router.routes}


# ---- compose ------------------------------------------------------------------------------------------


def test_compose_refers_to_what_there_is() -> None:
    content = compose()
    services = content["services"]
    assert set(services) == {"gateway", "prometheus", "redis"}
    assert services["redis"]["profiles"] == ["redis"]
    build = services["gateway"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith("./") else source in content["volumes"]
        for secret in service.get("secrets", []):
            assert secret in content["secrets"]
        for name in service.get("depends_on", {}):
            assert name in services
    target = next(volume for volume in services["gateway"]["volumes"] if volume.startswith("./gateway.yaml"))
    assert target.split(":")[1] == json.loads(value_of(stages()[-1], "CMD"))[-1]


def test_compose_gives_nothing_away() -> None:
    for name, service in compose()["services"].items():
        assert "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        image = service["image"]
        assert name == "gateway" or fnmatch.fnmatch(image, "*:*[0-9]*")
        assert not image.endswith(":latest")
    key = compose()["services"]["gateway"]["environment"]["SAGELLM_API_KEY"]
    assert key.startswith("${SAGELLM_API_KEY:?"), "without a key it must not start"


def test_prometheus_reads_the_gateway_with_its_key() -> None:
    content = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = content["scrape_configs"]
    port = read_gateway_file(DEPLOY / "gateway.yaml")[0].server.port
    assert job["static_configs"] == [{"targets": [f"gateway:{port}"]}]
    (secret,) = compose()["services"]["prometheus"]["secrets"]
    assert job["authorization"] == {"credentials_file": f"/run/secrets/{secret}"}
    assert compose()["secrets"][secret] == {"environment": "SAGELLM_API_KEY"}


# ---- systemd ------------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(DEPLOY / "sage-llm.service", encoding="utf-8")
    return parser


def test_the_service_starts_what_the_command_line_knows() -> None:
    program, *arguments = shlex.split(unit()["Service"]["ExecStart"])
    assert program == "/opt/sage-llm/bin/sage-llm"
    check_command_line(arguments)


def test_the_service_is_confined() -> None:
    service = unit()["Service"]
    wanted = {
        "DynamicUser": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "NoNewPrivileges": "yes",
        "PrivateDevices": "yes",
        "CapabilityBoundingSet": "",
        "KillSignal": "SIGTERM",
    }
    assert {name: service[name] for name in wanted} == wanted


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not there")


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    text = (DEPLOY / "sage-llm.service").read_text(encoding="utf-8")
    file = tmp_path / "sage-llm.service"
    file.write_text(text.replace("/opt/sage-llm/bin/sage-llm", "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    complaints = [line for line in done.stderr.splitlines() if "sage-llm.service" in line]
    assert (done.returncode, complaints) == (0, [])


@needs_systemd
def test_systemd_finds_the_service_well_confined() -> None:
    """The exposure of a service without these settings is 9.6 of 10."""
    unit_file = str(DEPLOY / "sage-llm.service")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit_file],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd cannot look at a file")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
