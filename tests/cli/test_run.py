"""`sage-llm run`: the answer, its forms, and how it fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_process import Cli, environment, run_process
from sagellm_core.models import resolve_model
from sagellm_protocol import FinishReason, Response

QUESTION = "What is LLM inference?"


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr(cli: Cli) -> None:
    outcome = cli("run", "-p", QUESTION)
    assert outcome.status == 0
    assert "model" in outcome.out
    assert outcome.out.endswith("\n")
    assert outcome.out.count("\n") == 1
    assert outcome.err.count("\n") == 1
    for word in ("tokens", "first token", "tokens/s"):
        assert word in outcome.err


def test_json_is_the_protocols_response(cli: Cli) -> None:
    plain = cli("run", "-p", QUESTION, "-n", "12")
    outcome = cli("run", "-p", QUESTION, "--max-tokens", "12", "--json")
    assert outcome.status == 0
    assert outcome.err == ""
    response = Response.model_validate_json(outcome.out)
    assert response.output_text + "\n" == plain.out
    assert response.finish_reason is FinishReason.LENGTH
    assert response.metrics.ttft_ms > 0


def test_the_prompt_may_come_from_standard_input(cli: Cli) -> None:
    assert cli("run", "-n", "12", stdin=QUESTION + "\n").out == cli("run", "-p", QUESTION, "-n", "12").out
    outcome = cli("run", stdin=b"\xff\xfe")
    assert (outcome.status, outcome.out) == (2, "")
    assert "standard input is not UTF-8" in outcome.err


@pytest.mark.slow
def test_flags_reach_the_sampler(cli: Cli) -> None:
    arguments = ("run", "-p", "Once upon a time", "--raw", "-n", "20")
    seeded = [cli(*arguments, "--temperature", "1.5", "--seed", seed).out for seed in ("1", "1", "2")]
    assert seeded[0] == seeded[1] != seeded[2]
    assert cli(*arguments, "--temperature", "2", "--top-k", "1").out == cli(*arguments).out
    assert cli(*arguments, "--preset", "deterministic").out == cli(*arguments).out
    stopped = cli(*arguments, "--stop", ",", "--stop", ".")
    assert not {",", "."} & set(stopped.out)
    assert cli(*arguments, "--num-beams", "3").status == 0
    assert cli(*arguments, "--strategy", "contrastive").status == 0


def test_raw_leaves_the_chat_template_out(cli: Cli) -> None:
    chat = json.loads(cli("run", "-p", "The", "-n", "2", "--json").out)
    raw = json.loads(cli("run", "-p", "The", "-n", "2", "--json", "--raw").out)
    system = json.loads(cli("run", "-p", "The", "-n", "2", "--json", "--system", "Be brief.").out)
    assert raw["usage"]["prompt_tokens"] == 1
    assert chat["usage"]["prompt_tokens"] < system["usage"]["prompt_tokens"]


# What other commands are for, what only some models and configurations need, and what torch loads for compilers.
NOT_FOR_RUN = (
    *("fastapi", "starlette", "uvicorn", "httpx", "aiohttp", "prometheus_client", "rich", "yaml", "psutil"),
    *("huggingface_hub", "transformers", "modelscope", "gguf", "torch._dynamo", "torch._inductor", "sympy", "networkx"),
    *("sagellm_benchmark", "sagellm_control_plane", "sagellm_gateway.app", "sagellm_gateway.settings"),
    *("sagellm_core.http", "sagellm_core.gguf_tokenizer", "sagellm_core.models.gguf"),
)


def test_an_answer_loads_only_what_it_needs(home: Path) -> None:
    code = (
        "import sys, torch\n"
        "torchs = set(sys.modules)\n"
        f"sys.argv = ['sage-llm', 'run', '-p', {QUESTION!r}, '-n', '2']\n"
        "from sagellm.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print(*sorted(set({NOT_FOR_RUN!r}) & (set(sys.modules) - torchs)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(home), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == [""]


def test_native_kernels_need_no_probe_of_the_librarys(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sagellm_backend._native", reason="the native kernels were not built: no C++ compiler")
    monkeypatch.setattr("sagellm_backend.invariance._probe", None)
    assert cli("run", "-p", QUESTION, "-n", "2").status == 0


@pytest.mark.parametrize("already_there", [False, True])
def test_the_engines_modules_are_kept_from_the_collector_and_a_callers_objects_are_not(
    already_there: bool, home: Path
) -> None:
    code = (
        f"import gc{', torch' if already_there else ''}\n"
        "from sagellm.cli.session import make_engine\n"
        "from sagellm_core.options import EngineFlags\n"
        "make_engine(EngineFlags(model='builtin'))\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(home), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", str(not already_there)]


def corrupt_model(folder: Path, how: str) -> Path:
    shutil.copytree(resolve_model("builtin"), folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif how == "corrupt":
        weights.write_bytes(b"\xff" * 1000)
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "unknown":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(
            json.dumps({**config, "architectures": ["FancyForCausalLM"]}), encoding="utf-8"
        )
    return folder


@pytest.mark.parametrize("how", ["truncated", "corrupt", "pickle", "unknown"])
def test_a_bad_checkpoint_is_one_line(cli: Cli, tmp_path: Path, how: str) -> None:
    folder = corrupt_model(tmp_path / how, how)
    outcome = cli("run", "-p", "hi", "-m", str(folder))
    assert outcome.status != 0
    assert outcome.out == ""
    assert outcome.err.startswith("error [")
    assert outcome.err.count("\n") == 1
    assert "internal" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-p", "hi", "-m", "/no/such/folder"], "not_found", "/no/such/folder"),
        (["-p", "hi", "--temperature", "-1"], "invalid_argument", "temperature must be >= 0, got -1"),
        (["-p", "hi", "--backend", "tpu"], "invalid_argument", "tpu"),
        (["-p", ""], "invalid_argument", "the prompt is empty"),
        (["-p", "  \n"], "invalid_argument", "the prompt is empty"),
        ([], "invalid_argument", "the prompt is empty"),
        (["-p", "hi " * 50, "--max-model-len", "16"], "invalid_argument", "context length is 16 tokens"),
        (["-p", "hi", "--max-model-len", "100000"], "invalid_argument", "the model takes 1024"),
        (["-p", "hi", "-n", "0"], "invalid_argument", "max_tokens must be"),
        (["-p", "hi", "--preset", "wild"], "invalid_argument", "unknown preset 'wild'"),
        (["-p", "hi", "--strategy", "magic"], "invalid_argument", "strategy must be"),
        (["-p", "hi", "--api-key", "k"], "invalid_argument", "--api-key is for the server of --url"),
        (["-p", "hi", "--num-beams", "2", "--temperature", "1"], "invalid_argument", "temperature must be 0"),
        (["-p", "hi", "--raw", "--system", "x"], "invalid_argument", "--system needs the chat template"),
    ],
)
def test_bad_input_is_one_line_with_its_code(cli: Cli, arguments: list[str], code: str, words: str) -> None:
    outcome = cli("run", *arguments)
    assert outcome.status == (2 if code == "invalid_argument" else 1)
    assert outcome.out == ""
    assert outcome.err.startswith(f"error [{code}]: ")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_too_little_memory_is_said(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("engine: {options: {kv_cache_memory_bytes: 1000}}", encoding="utf-8")
    monkeypatch.setenv("SAGELLM_CONFIG", str(file))
    outcome = cli("run", "-p", "hi")
    assert outcome.status == 1
    assert outcome.err.startswith("error [resource_exhausted]: ")
    assert outcome.err.count("\n") == 1


def test_debug_shows_where_it_happened(cli: Cli) -> None:
    for arguments in (["--debug", "run"], ["run", "--debug"]):
        outcome = cli(*arguments, "-p", "hi", "-m", "/no/such/folder")
        assert outcome.status == 1
        assert "Traceback" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("error [not_found]: ")


def test_a_fault_of_ours_is_one_line_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("sagellm.cli.run.make_engine", broken)
    outcome = cli("run", "-p", "hi")
    assert outcome.status == 1
    assert outcome.err == "error [internal]: ZeroDivisionError: division by zero (--debug shows where)\n"


@pytest.mark.slow
def test_the_answer_is_streamed_through_pipes(home: Path) -> None:
    outcome = run_process(["run", "-n", "12"], home, input=QUESTION)
    assert outcome.status == 0, outcome.err
    assert len(outcome.out.split()) > 5
    assert "first token" in outcome.err


@pytest.mark.slow
def test_a_process_fails_with_a_status_and_without_a_traceback(home: Path) -> None:
    outcome = run_process(["run", "-p", "hi", "--model", "/no/such/folder"], home)
    assert outcome.status == 1
    assert outcome.err.startswith("error [not_found]: ")
    assert "Traceback" not in outcome.err
