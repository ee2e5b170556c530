"""Policies from outside of the package: the example is installed, and known by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from sagellm_control_plane.plugins import Registry
from sagellm_control_plane.policies import SchedulingPolicy, get_policy
from sagellm_protocol import InvalidArgumentError

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugins" / "shortest_first"
GROUP = "sagellm.scheduling_policies"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example was installed into, as pip does it."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("source") / "shortest_first"
    copy.mkdir()
    for file in ("pyproject.toml", "sagellm_shortest_first.py"):
        (copy / file).write_text((EXAMPLE / file).read_text())
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--target", str(folder), str(copy)], check=True, timeout=120)
    return folder


def run(installed: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{dedent(code)}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_installed_scheduling_policy_orders_a_queue(installed: Path) -> None:
    code = """
        from sagellm_control_plane.fleet import Fleet
        from sagellm_control_plane.policies import PolicyContext, WaitingRequest, get_policy, list_policies
        from sagellm_control_plane.predictor import Predictor
        from sagellm_control_plane.queue import WaitQueue
        from sagellm_protocol import Request

        assert "shortest_first" in list_policies()
        fleet = Fleet()
        queue = WaitQueue(get_policy("shortest_first")(PolicyContext(Predictor(fleet), fleet)), 10)
        for number, size in enumerate((500, 20, 300)):
            queue.push(WaitingRequest(Request(prompt="x"), 0.0, size, 10, number), 0.0)
        print([queue.pop(1.0).num_prompt_tokens for _ in range(3)])
    """
    assert run(installed, code) == "[20, 300, 500]"


def test_an_installed_routing_policy_chooses_an_engine(installed: Path) -> None:
    code = """
        from sagellm_control_plane.fleet import Booking, Fleet
        from sagellm_control_plane.routing import RoutedRequest, RoutingContext, get_router, list_routers

        assert "most_room" in list_routers()
        fleet = Fleet()
        full, free = fleet.add("full", capacity=9), fleet.add("free", capacity=8)
        for _ in range(3):
            fleet.grant(full, Booking(10))
        request = RoutedRequest("r", "m", 10, 10)
        choice = get_router("most_room")(RoutingContext()).choose(request, fleet.rows(), fleet, 0)
        print(choice.row == free, choice.rule)
    """
    assert run(installed, code) == "True most places free"


def test_a_built_in_name_cannot_be_taken_over(tmp_path: Path) -> None:
    _entry_point(tmp_path, "fifo", "os:getcwd")
    code = """
        from sagellm_control_plane.policies import get_policy
        print(get_policy("fifo").__module__)
    """
    assert run(tmp_path, code) == "sagellm_control_plane.policies.fifo"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (
            "no_such_module:Policy",
            "UnavailableError scheduling_policy 'broken' (no_such_module:Policy) can't be loaded",
        ),
        ("os:getcwd", "InvalidArgumentError scheduling_policy 'broken' (os:getcwd) is no subclass of SchedulingPolicy"),
    ],
)
def test_a_broken_distribution_is_named(tmp_path: Path, value: str, error: str) -> None:
    _entry_point(tmp_path, "broken", value)
    code = """
        from sagellm_control_plane.policies import get_policy
        from sagellm_protocol import SageLLMError
        try:
            get_policy("broken")
        except SageLLMError as error:
            print(type(error).__name__, error.message)
    """
    assert run(tmp_path, code).startswith(error)


def test_names_are_sorted_and_unknown_ones_refused() -> None:
    things: Registry[object] = Registry(
        "x", "y:Z", {"b": "x:Y", "a": "x:Z"}, group="sagellm.no_such_group", field="thing"
    )
    assert things.names() == ["a", "b"]
    with pytest.raises(InvalidArgumentError, match="unknown thing 'c'; choose one of a") as error:
        things.get("c")
    assert error.value.context["field"] == "thing"
    assert issubclass(get_policy("fair"), SchedulingPolicy)


def _entry_point(folder: Path, name: str, value: str) -> None:
    """A distribution that was not made by us."""
    info = folder / "foreign-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")
