"""The files by which `ps` and `stop` know servers: whose process is ours, and who cleans up."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sagellm_core.server_registry import list_servers, registered, registry_folder

URL = "http://127.0.0.1:8123"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def only_file() -> Path:
    (file,) = registry_folder().glob("*.json")
    return file


def test_a_server_is_listed_while_it_runs() -> None:
    assert list_servers() == []
    with registered(kind="gateway", url=URL, models=["Qwen/Qwen3-1.7B", "b"]) as name:
        assert name == "Qwen3-1.7B"
        (record,) = list_servers()
        assert (record.name, record.port, record.pid) == (name, 8123, os.getpid())
        assert record.models == ["Qwen/Qwen3-1.7B", "b"]
        assert record.process is not None
        assert stat.S_IMODE(only_file().stat().st_mode) == 0o600
        assert stat.S_IMODE(registry_folder().stat().st_mode) == 0o700
    assert list_servers() == []
    assert list(registry_folder().glob("*.json")) == []


def test_the_file_holds_no_command_line() -> None:
    with registered(kind="gateway", url=URL, models=["a"]):
        assert sys.argv[0] not in only_file().read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("builtin", "builtin"),
        ("/models/my model.gguf", "my-model"),
        ("../..", "server"),
        ("a/b/", "b"),
        ("模型", "模型"),
    ],
)
def test_names_are_file_names(model: str, name: str) -> None:
    with registered(kind="gateway", url=URL, models=[model]) as given:
        assert given == name
        assert only_file().stem == name


def test_names_are_unique() -> None:
    with (
        registered(kind="gateway", url=URL, models=["a"]) as first,
        registered(kind="gateway", url=URL, models=["a"]) as second,
        registered(kind="engine", url=URL, models=["x"], name="a") as third,
    ):
        assert [first, second, third] == ["a", "a-2", "a-3"]
        assert [record.name for record in list_servers()] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize(
    "change",
    [{"pid": 2**22 + 1}, {"started_s": -5.0}, {"command_hash": "0" * 64}],
    ids=lambda change: next(iter(change)),
)
def test_a_process_that_only_has_the_id_is_not_ours(change: dict[str, object]) -> None:
    with registered(kind="gateway", url=URL, models=["a"]):
        file = only_file()
        record = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**record, **change}), encoding="utf-8")
        assert list_servers() == []
        assert not file.exists()


def test_what_a_dead_server_left_is_removed() -> None:
    code = (
        "import os\nfrom sagellm_core.server_registry import registered\n"
        f"with registered(kind='gateway', url={URL!r}, models=['a']):\n    os._exit(9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and not list(registry_folder().glob("*.json")):
        pass
    process.wait()
    assert only_file().stem == "a"
    assert list_servers() == []
    assert list(registry_folder().glob("*.json")) == []


def test_files_in_no_form_of_ours_are_left_alone() -> None:
    with registered(kind="gateway", url=URL, models=["a"]):
        for name, text in (("half.json", '{"name": "x"'), ("later.json", '{"future": 1}'), ("list.json", "[]")):
            (registry_folder() / name).write_text(text, encoding="utf-8")
        assert [record.name for record in list_servers()] == ["a"]
    assert len(list(registry_folder().glob("*.json"))) == 3


def test_a_folder_that_cannot_be_written_does_not_keep_a_server_from_serving(cache: Path) -> None:
    (cache / "sage-llm").write_text("a file", encoding="utf-8")
    with registered(kind="gateway", url=URL, models=["a"]) as name:
        assert name is None


def test_servers_that_start_at_the_same_time_have_names_of_their_own() -> None:
    code = (
        "import sys\nfrom sagellm_core.server_registry import registered\n"
        f"with registered(kind='gateway', url={URL!r}, models=['a']) as name:\n"
        "    print(name, flush=True)\n    sys.stdin.read()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    names = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
    assert sorted(names) == ["a", "a-2", "a-3"]
    assert sorted(record.name for record in list_servers()) == ["a", "a-2", "a-3"]
    for process in processes:
        process.communicate()
    assert list_servers() == []
