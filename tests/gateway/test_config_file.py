"""The file of `gateway --config`: what it says, and how its mistakes are said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sagellm_control_plane import ExecutionInstanceType
from sagellm_control_plane.autoscaler_config import AutoscalerConfig
from sagellm_core.config import BackendConfig, EngineConfig
from sagellm_gateway.config_file import GatewayFile, ServedEngine, read_gateway_file
from sagellm_gateway.launch import make_plan
from sagellm_gateway.options import ControlPlaneFlags, EnginesFlags, ServerFlags
from sagellm_gateway.settings import GatewaySettings
from sagellm_protocol import InvalidArgumentError, NotFoundError

EXAMPLE = Path(__file__).parents[2] / "examples" / "gateway.yaml"
FILE = """\
engines:
  - {model: small, model_path: builtin, options: {max_batch_size: 4}}
  - model: builtin
    kind: cpu
default_model: builtin
control_plane: {scheduling_policy: priority, max_num_waiting: 7}
server: {port: 9000}
limits:
  per_key: {requests_per_minute: 60}
log:
"""


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SAGELLM_API_KEY", "SAGELLM_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAGELLM_KEYS", str(tmp_path / "no-keys.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


def plan_of(
    engines: EnginesFlags | None = None, server: ServerFlags | None = None, control: ControlPlaneFlags | None = None
) -> Any:
    own = EngineConfig(model="configured")
    return make_plan(
        engines or EnginesFlags(),
        control or ControlPlaneFlags(),
        server or ServerFlags(),
        backend=BackendConfig(kind="cpu"),
        engine=own,
    )


def test_a_file_holds_engines_and_settings(file: Path) -> None:
    read, sections = read_gateway_file(file)
    assert [engine.model for engine in read.engines] == ["small", "builtin"]
    assert read.control_plane.scheduling_policy == "priority"
    assert sections == {"server": {"port": 9000}, "limits": {"per_key": {"requests_per_minute": 60}}}


def test_the_example_says_the_defaults() -> None:
    """What it shows besides engines and keys is what a gateway without a file has, as it claims."""
    read, sections = read_gateway_file(EXAMPLE)
    assert GatewaySettings(**sections) == GatewaySettings()
    assert read.backend == BackendConfig()
    assert read.control_plane == GatewayFile(engines=[ServedEngine()]).control_plane
    assert {engine.model for engine in read.engines} == {"builtin", "builtin-int8"}


def test_flags_win_over_the_file(file: Path) -> None:
    server = ServerFlags(port=0, requests_per_minute=5, api_key=["sk-sage-0123456789abcdef"], access_log="off")
    plan = plan_of(EnginesFlags(config=file), server, ControlPlaneFlags(scheduling_policy="fifo", replicas=2))
    assert (plan.settings.server.port, plan.settings.log.access) == (0, "off")
    assert plan.settings.limits.per_key.requests_per_minute == 5
    assert [key.name for key in plan.settings.auth.keys] == ["command-line-1"]
    assert (plan.control_plane.scheduling_policy, plan.control_plane.max_num_waiting) == ("fifo", 7)
    assert (plan.control_plane.replicas, plan.control_plane.place) == (2, "process")
    assert plan.default_model == "builtin"


def test_without_a_file_the_flags_or_the_configuration_decide() -> None:
    assert [engine.model for engine in plan_of().engines] == ["configured"]
    plan = plan_of(EnginesFlags(model=["a", "b"], backend="cuda"))
    assert [engine.model for engine in plan.engines] == ["a", "b"]
    assert plan.backend == BackendConfig(kind="cuda")
    assert plan.settings == GatewaySettings()


def test_the_control_plane_is_told_by_flags() -> None:
    control = ControlPlaneFlags(placement="local", replicas=3, routing_policy="session", failover=False)
    settings = plan_of(control=control).control_plane
    assert (settings.place, settings.replicas, settings.routing_policy) == ("local", 3, "session")
    assert not settings.failover.enabled
    assert settings.scheduling_policy == "adaptive"
    assert plan_of().control_plane.place == "local"
    for wrong in (ControlPlaneFlags(placement="cloud"), ControlPlaneFlags(routing_policy="nearest")):
        with pytest.raises(InvalidArgumentError, match=r"placement|routing_policy"):
            plan_of(control=wrong)


def test_a_number_of_engines_that_follows_the_load() -> None:
    control = plan_of(control=ControlPlaneFlags(replicas=2, max_replicas=4)).control_plane
    assert control.place == "process"
    scaling = control.for_models(["a", "b"]).autoscaling
    assert {(model, one.min_replicas, one.max_replicas) for model, one in scaling.items()} == {("a", 2, 4), ("b", 2, 4)}
    own = AutoscalerConfig(max_replicas=9)
    mixed = control.model_copy(update={"autoscaling": {"b": own}}).for_models(["a", "b"]).autoscaling
    assert (mixed["a"].max_replicas, mixed["b"]) == (4, own)
    assert plan_of().control_plane.for_models(["a"]).autoscaling == {}
    with pytest.raises(InvalidArgumentError, match=r"max_replicas \(2\) is below replicas \(3\)"):
        plan_of(control=ControlPlaneFlags(replicas=3, max_replicas=2))


def test_engines_that_are_kept_have_a_state_and_processes_of_their_own() -> None:
    state = Path("state.db")
    assert plan_of(control=ControlPlaneFlags(keep_engines=True, state=state)).control_plane.place == "process"
    with pytest.raises(InvalidArgumentError, match="keep_engines needs a state"):
        plan_of(control=ControlPlaneFlags(keep_engines=True))
    with pytest.raises(InvalidArgumentError, match="set placement to process"):
        plan_of(control=ControlPlaneFlags(keep_engines=True, state=state, placement="local"))


def test_the_control_plane_is_told_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "engines:\n"
        "  - {model: a, role: prefill, location: zone/rack, price_per_hour: 2.5}\n"
        "  - {model: a, role: decode}\n"
        "control_plane:\n"
        "  pd: {prefilling_threshold_input_tokens: 100}\n"
        "  failover: {max_moves: 3}\n"
        "  quotas: {default: {max_concurrent: 4}, tenants: {ada: {tokens_per_minute: 9}}}\n"
        "  lifecycle: {idle_unload_s: 60, breaker: {open_s: 2}}\n"
        "  policy_options: {}\n"
        "  autoscaling: {a: {max_replicas: 4, ttft_ms: 300}}\n"
        "  state: engines.db\n",
        encoding="utf-8",
    )
    plan = plan_of(EnginesFlags(config=path), control=ControlPlaneFlags(failover=False))
    fields = plan.engines[0].instance_fields()
    assert (fields["instance_type"], fields["location"]) == (ExecutionInstanceType.PREFILLING, "zone/rack")
    control = plan.control_plane
    assert control.pd is not None
    assert control.pd.prefilling_threshold_input_tokens == 100
    assert (control.failover.enabled, control.failover.max_moves) == (False, 3)
    assert control.quotas.of("ada").tokens_per_minute == 9
    assert control.lifecycle.breaker.open_s == 2
    assert control.state == Path("engines.db")
    assert control.autoscaling["a"].max_replicas == 4
    assert control.place == "process"


def test_engines_stand_in_one_place(file: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="--model and --config exclude each other"):
        plan_of(EnginesFlags(config=file, model=["a"]))


def test_a_key_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="--api-key must have at least 20"):
        plan_of(server=ServerFlags(api_key=["secret"]))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("server: {port: 8000}\n", 1, "engines is required"),
        ("engines: []\n", 1, "engines must not be empty"),
        ("engines: [{model: a}]\n\nlimits:\n  per_key:\n    requests_per_minute: 0\n", 5, "must be >= 1, got 0"),
        ("engines: [{model: a}]\nserver:\n  prot: 1\n", 3, "did you mean 'port'?"),
        ("engines: [{model: a}]\nservr: {}\n", 2, "did you mean 'server'?"),
        (
            "engines:\n  - model: a\n  - model: b\n    options:\n      max_batch_size: 0\n",
            5,
            "engines[1].options.max_b",
        ),
        ("engines:\n  - model: a\n  - model: b\n    options:\n      block: 0\n", 5, "engines[1].options"),
        ("engines:\n  - {model: a, engine_id: x}\n  - {model: b, engine_id: x}\n", 3, "engines[1].engine_id"),
        ("engines: [{model: a}]\ndefault_model: c\n", 2, "default_model is 'c', the engines have a; name one"),
        ("engines: [{model: a}]\ncontrol_plane:\n  scheduling_policy: x\n", 3, "choose one of adaptive"),
        ("engines: [{model: a}]\nauth:\n  keys:\n    - name: x\n      hash: secret\n", 5, "never the key itself"),
        ("engines: [{model: a}]\nlog: {}\nlog: {}\n", 3, "log stands there twice; remove one"),
        ("engines: [{model: a}\nlog: {}\n", 2, "is not YAML"),
        ("engines: [{model: a}]\n\ttabs: 1\n", 2, "is not YAML"),
    ],
)
def test_a_mistake_is_said_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError) as caught:
        read_gateway_file(path)
    assert str(caught.value).startswith(f"{path}, line {line}")
    assert words in str(caught.value)


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"an example is examples/gateway\.yaml"):
        read_gateway_file(tmp_path / "none.yaml")
    for content in (b"", b"- a\n", b"\xff\xfe\x00"):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=r"bad\.yaml"):
            read_gateway_file(path)
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(InvalidArgumentError, match="is it the right file"):
        read_gateway_file(path)
