"""The OpenAPI document against a real server: what schemathesis makes of it gets no 5xx and no undocumented status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli_process import SUPPORT, server

pytest.importorskip("schemathesis")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
# Never end; take the engine away; would be the same for a thousand texts of a path.
LEFT_OUT = r"stats/stream|/admin/events|/admin/engines/|/replace$|/page/"


@pytest.mark.parametrize("paths", [r"^/v1/", r"^/(?!v1/)"])
def test_generated_requests_get_documented_answers(tmp_path: Path, paths: str) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--checks", ",".join(CHECKS)]
    command += ["--include-path-regex", paths, "--exclude-path-regex", LEFT_OUT, "--phases", "coverage,fuzzing"]
    command += ["--max-examples", "15", "--seed", "1", "--continue-on-failure", "--request-timeout", "10"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(SUPPORT)}
    with server([json.dumps({"log": {"access": "off"}})], tmp_path, module="fake_gateway") as process:
        run = subprocess.run(
            [*command, f"{process.url}/openapi.json"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.stop(signal.SIGTERM) == 0
        assert not [line for line in process.log if "Traceback" in line], "".join(process.log)
    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    counted = re.search(r"([\d,]+) generated", report)
    assert counted is not None, report
    assert int(counted[1].replace(",", "")) >= 1000
