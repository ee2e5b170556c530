"""`sage-llm chat`: turns, commands, and Ctrl-C in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli_process import Cli
from sagellm.cli.chat import fit
from terminal import Terminal


def test_a_conversation_keeps_its_turns(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def spy(_: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        seen.append([message["role"] for message in messages])
        return messages

    monkeypatch.setattr("sagellm.cli.chat.fit", spy)
    lines = ["Who are you?", "", "/help", "What is LLM inference?", "/clear", "Hello", "/exit", "never asked"]
    outcome = cli("chat", "--system", "Be brief.", "-n", "16", stdin="\n".join(lines))
    assert outcome.status == 0
    assert seen == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert len(outcome.out.splitlines()) == 3
    assert "Chat with builtin" in outcome.err
    assert "starts anew" in outcome.err
    assert outcome.err.count("first token") == 3


def test_the_end_of_input_ends_the_conversation(cli: Cli) -> None:
    outcome = cli("chat", stdin="")
    assert (outcome.status, outcome.out) == (0, "")


def test_a_message_that_is_too_long_is_refused_and_forgotten(cli: Cli) -> None:
    outcome = cli("chat", "--max-model-len", "40", "-n", "4", stdin="hello " * 60 + "\nhello\n")
    assert outcome.status == 0
    assert "error [invalid_argument]: " in outcome.err
    assert outcome.err.count("first token") == 1


class CountingTokenizer:
    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)


def test_the_oldest_turns_are_dropped_and_the_system_message_stays() -> None:
    class Engine:
        class config:
            max_model_len = 40

        tokenizer = CountingTokenizer()

    turns = [{"role": role, "content": "x" * 6} for role in ("user", "assistant") * 3]
    question = {"role": "user", "content": "q"}
    system = {"role": "system", "content": "s"}
    engine: Any = Engine()
    assert fit(engine, [system, *turns, question]) == [system, *turns[4:], question]
    assert fit(engine, [*turns[:2], question]) == [*turns[:2], question]
    long = {"role": "user", "content": "y" * 99}
    assert fit(engine, [system, *turns, long]) == [system, long]


@pytest.mark.slow
def test_ctrl_c_ends_one_answer_and_ctrl_d_the_conversation(home: Path, endless_model: Path) -> None:
    terminal = Terminal(["chat", "--model", str(endless_model), "-n", "50000", "--max-model-len", "60000"], home)
    try:
        terminal.wait_for("Chat with")
        terminal.wait_for("> ")
        terminal.interrupt_prompt()  # at the prompt it only clears the line
        for _ in range(2):
            terminal.send("Tell me a story\n")
            terminal.wait_for("story")
            terminal.wait_for(" the ")
            terminal.send("\x03")
            terminal.wait_for("(stopped)", timeout_s=60)
            terminal.wait_for("> ")
        assert terminal.process.poll() is None
        terminal.send("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()


@pytest.mark.slow
def test_ctrl_c_ends_a_run(home: Path, endless_model: Path) -> None:
    terminal = Terminal(
        ["run", "-p", "Tell me a story", "-m", str(endless_model), "-n", "50000", "--max-model-len", "60000"], home
    )
    try:
        terminal.wait_for(" the ")
        terminal.send("\x03")
        assert terminal.process.wait(timeout=30) == 130
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()
