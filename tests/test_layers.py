"""Ten packages in strict layers, each with a docstring and sorted exports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = (
    "sagellm",
    "sagellm_backend",
    "sagellm_benchmark",
    "sagellm_comm",
    "sagellm_compression",
    "sagellm_control_plane",
    "sagellm_core",
    "sagellm_gateway",
    "sagellm_kv_cache",
    "sagellm_protocol",
)


def linter_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest: the order in which the linter keeps `__all__`."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_these_are_all_packages() -> None:
    found = sorted(folder.parent.name for folder in (REPOSITORY / "src").glob("*/__init__.py"))
    assert found == sorted(PACKAGES)
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert f'"src/{package}"' in project, f"{package} is not in the wheel"


def test_every_package_imports_only_what_stands_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    linter = pytest.importorskip("importlinter.cli", reason="needs import-linter: pip install -e '.[dev]'")
    monkeypatch.chdir(REPOSITORY)
    status = linter.lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_says_what_it_holds(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__doc__
    assert len(package.__doc__.splitlines()[0]) > 20
    assert package.__all__ == sorted(package.__all__, key=linter_order)
    for export in package.__all__:
        assert getattr(package, export) is not None
    assert (REPOSITORY / "src" / name / "py.typed").is_file()
