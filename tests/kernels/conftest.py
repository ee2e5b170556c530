"""Every table of the compiled kernels that this processor can run, forced by argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch  # before the kernels: they share its thread pool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sagellm_backend.cpu.native import NativeOps


def _isas() -> list[str]:
    try:
        from sagellm_backend.cpu.native import supported_isas
    except ImportError:
        return []
    return supported_isas()


ISAS = _isas()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ops" in metafunc.fixturenames:
        skip = pytest.mark.skip(reason="the native kernels were not built: no C++ compiler at installation")
        metafunc.parametrize("ops", ISAS or [pytest.param("none", marks=skip)], indirect=True)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> NativeOps:
    """The ops of one instruction set."""
    from sagellm_backend.cpu.native import NativeOps

    return NativeOps(ISAS.index(request.param))


@pytest.fixture
def portable_ops() -> NativeOps:
    """The ops of the table that runs on any processor: what every other table must equal to the bit."""
    from sagellm_backend.cpu.native import NativeOps

    return NativeOps(ISAS.index("generic"))


@pytest.fixture(autouse=True)
def _torch() -> Iterator[None]:
    """Tests may change torch's number of threads; their random numbers are the same in any order."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
