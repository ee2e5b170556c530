"""Lazy exports: the three lists of an `__init__.py` agree, and nothing is imported before it is asked for."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
LAZY_PACKAGES = sorted(
    ".".join(file.parent.relative_to(SOURCE).parts)
    for file in SOURCE.rglob("__init__.py")
    if "lazy_exports(" in file.read_text(encoding="utf-8")
)


def tree_of(package: str) -> ast.Module:
    """A package's `__init__.py`."""
    return ast.parse((SOURCE / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))


def own_names(package: str) -> set[str]:
    """What its `__init__.py` makes itself."""
    body = tree_of(package).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return functions | {ast.unparse(target) for node in body if isinstance(node, ast.Assign) for target in node.targets}


def names_for_type_checkers(package: str) -> set[str]:
    """The names that the TYPE_CHECKING block of a package's `__init__.py` imports."""
    tree = tree_of(package)
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def test_there_are_lazy_packages() -> None:
    assert {"sagellm", "sagellm_core", "sagellm_protocol"} <= set(LAZY_PACKAGES)


@pytest.mark.parametrize("package", LAZY_PACKAGES)
def test_all_lists_of_exports_agree(package: str) -> None:
    module = importlib.import_module(package)
    typed = names_for_type_checkers(package)
    assert set(module.__all__) - own_names(package) == typed
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


def test_unknown_names_are_refused_as_by_any_module() -> None:
    module = importlib.import_module("sagellm_core")
    with pytest.raises(AttributeError, match="module 'sagellm_core' has no attribute 'Enginee'"):
        _ = module.Enginee
    assert not hasattr(module, "Enginee")


def test_an_alias_is_the_same_object() -> None:
    from sagellm_core import ContinuousBatchingScheduler, Scheduler

    assert ContinuousBatchingScheduler is Scheduler


def test_importing_the_umbrella_loads_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, sagellm, sagellm_core, sagellm_backend, sagellm_control_plane\n"
        "sys.exit(', '.join({'torch', 'numpy', 'pydantic', 'fastapi'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_control_plane_is_at_hand_without_torch() -> None:
    code = (
        "import sys; from sagellm import BackendConfig, ControlPlaneManager, EngineConfig\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
