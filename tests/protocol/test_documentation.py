"""docs/protocol.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from sagellm_protocol import Error, ErrorCode, SageLLMError, SamplingParams, SamplingPreset

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def test_the_error_table_is_right() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (yes|no) \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)
    actual = {
        (code.value, str(code.http_status), "yes" if code.retryable else "no", type(_exception(code)).__name__)
        for code in ErrorCode
    }
    assert set(rows) == actual


def _exception(code: ErrorCode) -> SageLLMError:
    return Error(code=code, message="m").to_exception()


def test_the_preset_table_is_right() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (greedy|sampling) \|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == {preset.value for preset in SamplingPreset}
    for name, strategy, cell in rows:
        params = SamplingParams.from_preset(name)
        values = {field: float(value) for field, value in re.findall(r"(\w+) ([\d.]+)", cell)}
        assert params.strategy.value == strategy
        assert {field: getattr(params, field) for field in values} == values


def test_the_snippet_runs() -> None:
    snippet = PAGE.partition("```python\n")[2].partition("```")[0]
    expected = snippet.rpartition("# ")[2].strip()
    printed: list[str] = []
    exec(compile(snippet, "docs/protocol.md", "exec"), {"print": lambda error: printed.append(str(error))})
    assert printed == [expected]
