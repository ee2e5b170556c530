"""Shell completion: what a tab offers, without an import of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli_process import environment
from sagellm_control_plane.policies import POLICIES
from sagellm_core.server_registry import registered

CODE = (
    "import sys\nsys.argv = ['sage-llm', *sys.argv[1:]]\nfrom sagellm.cli import main\n"
    "try:\n    main()\nfinally:\n"
    "    print(*sorted({'torch', 'numpy', 'fastapi', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
)


def run(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env=environment(home, **variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def complete(line: str, home: Path) -> list[str]:
    """What bash is offered behind `sage-llm LINE`."""
    words = f"sage-llm {line}"
    number = str(len(words.split(" ")) - 1)
    done = run(home, _SAGE_LLM_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
    assert done.stderr.split() == [], done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("se", {"serve"}),
        ("run --model buil", {"builtin"}),
        ("gateway -m ", {"builtin"}),
        ("chat --backend c", {"cpu", "cuda"}),
        ("serve --quantization int4-", {"int4-asym", "int4-g64", "int4-g128"}),
        ("run --preset b", {"balanced"}),
        ("run --strategy ", {"greedy", "sampling", "beam_search", "contrastive"}),
        ("gateway --scheduling-policy ", set(POLICIES)),
        ("gateway --routing-policy r", {"random", "round_robin"}),
        ("serve --placement ", {"local", "process"}),
        ("bench latency --dtype b", {"bf16"}),
        ("serve --engine", {"--engine-only"}),
        ("stop ", set()),
    ],
)
def test_a_tab_offers_what_there_is(home: Path, line: str, wanted: set[str]) -> None:
    assert set(complete(line, home)) == wanted


def test_what_runs_can_be_stopped_with_a_tab(home: Path) -> None:
    with registered(kind="gateway", url="http://127.0.0.1:1", models=["mine"]):
        assert complete("stop m", home) == ["mine"]


def test_models_in_the_hubs_cache_are_offered(home: Path) -> None:
    folder = home / "hf" / "hub" / "models--owner--small"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc", encoding="utf-8")
    (folder / "snapshots" / "abc" / "config.json").write_text("{}", encoding="utf-8")
    assert complete("run --model ow", home) == ["owner/small"]


def test_other_shells_are_answered_too(home: Path) -> None:
    zsh = run(home, _SAGE_LLM_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="sage-llm run --backend cu")
    assert "cuda" in zsh.stdout
    fish = run(
        home,
        _SAGE_LLM_COMPLETE="complete_fish",
        _TYPER_COMPLETE_ARGS="sage-llm run --backend cu",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert fish.stdout.split() == ["cuda"]


def test_the_script_can_be_shown_and_installed(home: Path) -> None:
    """Typer asks the process above for its shell where it can, and else takes the shell's name."""
    for name in ("--show-completion", "--install-completion"):
        done = subprocess.run(
            ["bash", "-c", f'"$0" -c "$1" {name}; exit $?', sys.executable, CODE],
            env=environment(home),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "sage_llm_completion" in done.stdout or "completion installed in" in done.stdout
    script = home / ".bash_completions" / "sage-llm.sh"
    assert "_SAGE_LLM_COMPLETE=complete_bash" in script.read_text(encoding="utf-8")
    assert str(script) in (home / ".bashrc").read_text(encoding="utf-8")
