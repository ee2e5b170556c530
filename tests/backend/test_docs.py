"""The example of docs/backend.md works as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from sagellm_backend import get_provider
from sagellm_backend.ops import OP_NAMES, OPS
from sagellm_protocol import DType

DOCUMENT = Path(__file__).parents[2] / "docs" / "backend.md"


@pytest.fixture
def installed_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.DOTALL)
    entry_points = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert code
    assert entry_points
    (tmp_path / "my_chip.py").write_text(code[1])
    info = tmp_path / "my_chip-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-chip\nVersion: 1.0\n")
    group, line = entry_points[1].strip().splitlines()
    section = group.removeprefix("[project.entry-points.").removesuffix("]").strip('"')
    (info / "entry_points.txt").write_text(f"[{section}]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(OPS, "_implementations", {name: [*OPS.implementations(name)] for name in OPS.names()})
    monkeypatch.delitem(sys.modules, "my_chip", raising=False)


@pytest.mark.usefixtures("installed_example")
def test_the_example_is_a_whole_backend() -> None:
    provider = get_provider("my_chip", device="cpu")
    explained = provider.ops.explain()
    assert explained["gelu"] == "my_chip"
    assert {explained[name] for name in OP_NAMES if name != "gelu"} == {"reference"}
    assert provider.ops.gelu(torch.zeros(2)).tolist() == [0, 0]
    provider.kv_block_free(provider.kv_block_alloc(4, DType.FP32))
    assert "my_chip" not in get_provider("cpu").ops.explain().values()


def test_the_first_snippet_runs() -> None:
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    exec(compile(code[1], str(DOCUMENT), "exec"), {})
