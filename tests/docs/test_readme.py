"""The READMEs say what works: commands exist, snippets run, links and named files are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from sagellm.cli import app
from sagellm_core.models.registry import MODELS
from sagellm_protocol import parse
from sagellm_protocol.openai import ChatCompletionRequest

REPOSITORY = Path(__file__).resolve().parents[2]
BUILTIN = REPOSITORY / "src" / "sagellm_core" / "models" / "builtin" / "model.safetensors"
READMES = ("README.md", "README.zh-CN.md")
PAGES = sorted(
    str(page.relative_to(REPOSITORY)) for page in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
)
SOURCES = [
    f"/{path.relative_to(REPOSITORY).as_posix()}"
    for folder in ("benchmarks", "csrc", "examples", "src", "tests", "tools")
    for path in (REPOSITORY / folder).rglob("*.*")
]
COMMANDS = (
    'pip install . && sage-llm run -p "What is LLM inference?"',
    'pip install -e ".[dev]" && pytest -q -m "not slow"',
)


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def prose_of(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """The fragments by which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES)
def test_the_two_commands_stand_on_the_first_screen(readme: str) -> None:
    found = re.findall(r"^<!-- command (\d)\b.*-->\n```bash\n(.*)\n```$", text_of(readme), re.MULTILINE)
    assert found == [("1", COMMANDS[0]), ("2", COMMANDS[1])]
    assert text_of(readme).index(COMMANDS[1]) < 1500


def test_both_languages_show_the_same_code() -> None:
    english, chinese = READMES
    assert blocks(english, "python") == blocks(chinese, "python")
    calls = [
        [line.split("#")[0].split('"')[0].rstrip() for block in blocks(page, "bash") for line in block.splitlines()]
        for page in READMES
    ]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("page", PAGES)
def test_the_shown_commands_are_understood(page: str) -> None:
    """Name and options of every `sage-llm` call in a block or in a sentence exist; nothing is run."""
    shown = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    calls = [line[line.index("sage-llm ") :] for line in shown if "sage-llm " in line]
    for call in calls + re.findall(r"`(sage-llm [^`\n]+)`", prose_of(page)):
        command, words = typer.main.get_command(app), shlex.split(call, comments=True)[1:]
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0].split("|")[0] in command.commands, call
            command = command.commands[words.pop(0).split("|")[0]]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, call
        if call in calls and "[" not in call:  # as one would type it
            command.make_context(command.name, words).close()
    assert calls or page not in READMES


@pytest.mark.parametrize("readme", READMES)
def test_the_table_names_every_command(readme: str) -> None:
    group = typer.main.get_command(app)
    first_cells = re.findall(r"^\| (.+?) \|", text_of(readme), re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert set(group.commands) <= named


@pytest.mark.parametrize("readme", READMES)
def test_the_shown_request_is_valid(readme: str) -> None:
    bodies = [body for block in blocks(readme, "bash") for body in re.findall(r"-d '(.*?)'", block)]
    assert bodies
    for body in bodies:
        assert parse(ChatCompletionRequest, json.loads(body), what=readme).stream


def test_every_family_is_named() -> None:
    names = {"GPT2LMHeadModel": "GPT-2", "GPTNeoXForCausalLM": "GPT-NeoX", "Phi3ForCausalLM": "Phi-3"}
    names |= {"Gemma2ForCausalLM": "Gemma 2", "Olmo2ForCausalLM": "OLMo 2", "Qwen3MoeForCausalLM": "Qwen3-MoE"}
    names |= {"Gemma3ForCausalLM": "Gemma 3", "Gemma3ForConditionalGeneration": "Gemma 3"}
    for readme in READMES:
        for architecture in MODELS:
            name = names.get(architecture) or re.sub("(ForCausalLM|ForMaskedLM|Model)$", "", architecture)
            assert name in text_of(readme), f"{readme} does not name {architecture}"


@pytest.mark.skipif(not BUILTIN.is_file(), reason=f"the built-in model is not here: {BUILTIN} is missing")
def test_the_python_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = blocks("README.md", "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
        assert len(capsys.readouterr().out.split()) > 10


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert file.exists(), f"{page} links to {target}"
        if fragment:
            assert fragment in anchors(str(file.resolve().relative_to(REPOSITORY))), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    """A source file named in a page stands in the repository, or below one of the packages."""
    for name in re.findall(r"(?<![\w/.-])(\w[\w/]*\.(?:py|cpp))\b", text_of(page)):
        is_example = name.startswith("my_") or name == "llama.cpp"
        assert is_example or any(path.endswith(f"/{name}") for path in SOURCES), f"{page} names {name}"
