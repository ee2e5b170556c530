"""Packed weights on disk: the second start reads what the first packed, and nothing on disk can make it wrong."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from tests.support.model_driver import prompt_logits
from tests.support.model_zoo import build

from sagellm_backend import CPUBackendProvider
from sagellm_core.models import CausalLM, load_model
from sagellm_core.models.checkpoint import read_safetensors_header
from sagellm_core.models.packed_cache import default_folder

pytest.importorskip("sagellm_backend._native", reason="the native kernels were not built: no C++ compiler")

IDS = list(range(3, 30))
LIMIT = 1 << 30


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagellm_core.models.loader._SMALLEST_KEPT", 0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("gemma2", path)
    return path


def load(path: Path, folder: Path, *, quantization: str = "int4", cache_bytes: int = LIMIT) -> CausalLM:
    provider = CPUBackendProvider()
    return load_model(path, provider=provider, quantization=quantization, cache_folder=folder, cache_bytes=cache_bytes)


def logits(model: CausalLM) -> torch.Tensor:
    return prompt_logits(model, CPUBackendProvider(), IDS)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_the_second_start_reads_what_the_first_packed(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(model_folder, tmp_path)
    assert len(files(tmp_path)) == 1
    assert not list(tmp_path.glob("*.part"))
    tensors, _ = read_safetensors_header(files(tmp_path)[0])
    assert min(info.offset for info in tensors.values()) % 64 == 0
    # Nothing is quantized again.
    monkeypatch.setattr("sagellm_compression.quantization.base.SymmetricRounding.pack", None)
    second = load(model_folder, tmp_path)
    assert torch.equal(logits(first), logits(second))
    assert (second.weight_bytes, second.weight_formats) == (first.weight_bytes, first.weight_formats)


def test_another_method_another_file(model_folder: Path, tmp_path: Path) -> None:
    for number, quantization in enumerate(("none", "int4", "int8", "int4-asym")):  # floats are not kept
        fresh = logits(load(model_folder, tmp_path, quantization=quantization))
        assert len(files(tmp_path)) == number
        assert torch.equal(fresh, logits(load(model_folder, tmp_path, quantization=quantization)))


def test_small_models_and_a_limit_of_zero_leave_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model_folder, tmp_path, cache_bytes=0)
    monkeypatch.undo()
    load(model_folder, tmp_path)
    assert not files(tmp_path)


def test_a_changed_checkpoint_is_packed_anew(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    before = logits(load(copy, tmp_path / "cache"))
    build("gemma2", copy, seed=1)
    after = logits(load(copy, tmp_path / "cache"))
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(load(copy, tmp_path / "cache")))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "header", "number"])
def test_a_damaged_file_counts_as_absent_and_is_written_again(
    model_folder: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(load(model_folder, tmp_path))
    (file,) = files(tmp_path)
    content = file.read_bytes()
    ruined = {
        "truncated": content[:-100],
        "emptied": b"",
        "header": b"\xff" * 64 + content[64:],
        "number": content.replace(b'in_features\\": 64', b'in_features\\": 96', 1),
    }[damage]
    assert ruined != content
    file.write_bytes(ruined)
    with caplog.at_level(logging.WARNING, logger="sagellm_core"):
        assert torch.equal(logits(load(model_folder, tmp_path)), expected)
        assert "is damaged" in caplog.text
        caplog.clear()
        assert torch.equal(logits(load(model_folder, tmp_path)), expected)
    assert not caplog.text


def test_the_file_is_plain_safetensors(model_folder: Path, tmp_path: Path) -> None:
    load(model_folder, tmp_path, quantization="int8")
    (file,) = files(tmp_path)
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8, torch.float16}
    infos, _ = read_safetensors_header(file)
    assert all(info.offset % 64 == 0 for info in infos.values() if info.dtype == "U8")


def test_a_full_disk_leaves_nothing_but_a_warning(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with caplog.at_level(logging.WARNING, logger="sagellm_core"):
        load(model_folder, tmp_path)
    assert "packed weights are not kept" in caplog.text
    assert not files(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_what_a_killed_start_left_goes_after_a_while(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "old.part").write_bytes(b"half")
    (tmp_path / "new.part").write_bytes(b"half")
    os.utime(tmp_path / "old.part", (0, 0))
    load(model_folder, tmp_path)
    assert [file.name for file in tmp_path.glob("*.part")] == ["new.part"]


def test_who_finds_the_lock_taken_does_without_writing(model_folder: Path, tmp_path: Path) -> None:
    load(model_folder, tmp_path)
    (file,) = files(tmp_path)
    file.unlink()
    with FileLock(file.with_suffix(".lock")):
        load(model_folder, tmp_path)
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_warning(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with caplog.at_level(logging.WARNING, logger="sagellm_core"):
        load(model_folder, blocked / "packed")
    assert "packed weights are not kept" in caplog.text


def test_the_oldest_files_go_when_the_folder_is_full(model_folder: Path, tmp_path: Path) -> None:
    load(model_folder, tmp_path)
    (oldest,) = files(tmp_path)
    size = oldest.stat().st_size
    load(model_folder, tmp_path, quantization="int4-g64", cache_bytes=int(2.5 * size))
    load(model_folder, tmp_path, quantization="int4-asym", cache_bytes=int(2.5 * size))
    kept = files(tmp_path)
    assert oldest not in kept
    assert len(kept) == 2


def test_the_folder_is_where_caches_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "sage-llm" / "packed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "sage-llm" / "packed"


@pytest.mark.slow
def test_starts_at_the_same_time_all_work(model_folder: Path, tmp_path: Path) -> None:
    """Four processes that all find nothing, and one that is killed while it may be writing."""
    script = (
        "import sys; from pathlib import Path; from sagellm_backend import CPUBackendProvider;"
        "from sagellm_core.models import load_model, loader; loader._SMALLEST_KEPT = 0;"
        "[load_model(sys.argv[1], provider=CPUBackendProvider(), quantization=q, cache_folder=Path(sys.argv[2]),"
        " cache_bytes=1 << 30) for q in ('int4', 'int8', 'int4-asym')]"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(model_folder), str(tmp_path)]) for _ in range(5)]
    processes[0].kill()
    assert [process.wait(timeout=240) for process in processes][1:] == [0] * 4
    assert len(files(tmp_path)) == 3
    alone = logits(load(model_folder, tmp_path / "other"))
    assert torch.equal(logits(load(model_folder, tmp_path)), alone)
