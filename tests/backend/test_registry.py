"""`get_provider`: the choice, the refusals, and backends of other packages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import sagellm_backend
from sagellm_backend import BackendProvider, CPUBackendProvider, MockBackendProvider, get_provider, list_kinds
from sagellm_backend.providers import ascend, cuda, haiguang, kunlun
from sagellm_protocol import InternalError, InvalidArgumentError, UnavailableError

BUILT_IN = ["ascend", "cpu", "cuda", "haiguang", "kunlun", "mock"]
CHIPS = (cuda, ascend, kunlun, haiguang)
BACKEND_FILE = """
from sagellm_backend import MockBackendProvider
def create(**options):
    return MockBackendProvider(device_name="foreign", **options)
def wrong(**options):
    return 3
"""


@pytest.fixture
def no_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(**options: object) -> BackendProvider:
        raise UnavailableError("no such card")

    for module in CHIPS:
        monkeypatch.setattr(module, "create", absent)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a distribution on the path that offers backends, as pip would."""

    def put(entries: str) -> None:
        info = tmp_path / "foreign_backend-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-backend\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[sagellm.backends]\n{entries}\n")
        (tmp_path / "foreign_backend_module.py").write_text(BACKEND_FILE)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "foreign_backend_module", raising=False)

    return put


@pytest.mark.usefixtures("no_chips")
def test_auto_takes_the_cpu_where_there_is_nothing_else() -> None:
    assert isinstance(get_provider(), CPUBackendProvider)
    assert isinstance(get_provider("auto", device="cpu"), CPUBackendProvider)


@pytest.mark.usefixtures("no_chips")
def test_auto_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in reversed(CHIPS):
        kind = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "create", lambda kind=kind, **_: MockBackendProvider(device_name=kind))
        assert get_provider().capability().device_name == kind


@pytest.mark.usefixtures("no_chips")
def test_auto_never_takes_another_device_than_asked_for() -> None:
    with pytest.raises(UnavailableError, match=r"no usable backend has a device 'cuda:0' \(cuda: no such card; kunlun"):
        get_provider(device="cuda:0")
    with pytest.raises(InvalidArgumentError, match="is no device"):
        get_provider(device="graphics")


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown backend 'tpu': use auto or one of ascend, cpu, cuda, hai"):
        get_provider("tpu")


def test_an_unknown_option_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidArgumentError, match=r"backend 'cpu' can't be made with these options: .*'colour'"):
        get_provider("cpu", colour="red")


def test_options_reach_the_provider() -> None:
    assert get_provider("mock", total_memory_bytes=7).memory_info().total_bytes == 7


def test_every_built_in_kind_is_listed() -> None:
    assert set(BUILT_IN) <= set(list_kinds())


def test_another_package_adds_a_kind(install: Callable[[str], None]) -> None:
    install("foreign_chip = foreign_backend_module:create")
    assert "foreign_chip" in list_kinds()
    provider = get_provider("foreign_chip", total_memory_bytes=5)
    assert provider.capability().device_name == "foreign"
    assert provider.memory_info().total_bytes == 5


def test_a_broken_package_is_named(install: Callable[[str], None]) -> None:
    install("a = no_such_module_anywhere:create\nb = foreign_backend_module:missing\nc = foreign_backend_module:wrong")
    with pytest.raises(UnavailableError, match=r"backend 'a' \(no_such_module_anywhere:create\) can't be loaded"):
        get_provider("a")
    with pytest.raises(UnavailableError, match="backend 'b'"):
        get_provider("b")
    with pytest.raises(InternalError, match="backend 'c' returned int"):
        get_provider("c")


def test_a_built_in_name_cannot_be_taken_over(install: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    install("cpu = foreign_backend_module:create")
    with caplog.at_level(logging.WARNING, logger="sagellm_backend"):
        assert isinstance(get_provider("cpu"), CPUBackendProvider)
        assert "cpu" in list_kinds()
    assert "backend 'cpu' of foreign_backend_module:create is ignored" in caplog.text


def test_the_projects_entry_points_name_real_factories() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("reads pyproject.toml with tomllib, which came with Python 3.11")
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    offered = project["entry-points"]["sagellm.backends"]
    assert sorted(offered) == BUILT_IN
    for name, value in offered.items():
        assert callable(EntryPoint(name, value, "sagellm.backends").load())


def test_the_package_exports_what_it_says() -> None:
    names = sagellm_backend.__all__
    assert sorted(names) == sorted(set(names))
    assert all(getattr(sagellm_backend, name) is not None for name in names)
    assert set(names) <= set(dir(sagellm_backend))
    with pytest.raises(AttributeError, match="no_such_name"):
        sagellm_backend.no_such_name  # noqa: B018
