"""The planner: costs by config.json, the roofline's limits, layouts, plans."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_control_plane.config import ParallelismConfig
from sagellm_control_plane.planner import (
    Cluster,
    Engine,
    Layout,
    Objectives,
    Plan,
    Roofline,
    load_devices,
    make_plan,
    parse_cluster,
    read_model_costs,
)
from sagellm_control_plane.planner.explain import as_json, explain
from sagellm_protocol import InvalidArgumentError, NotFoundError

DEVICES = load_devices()
LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8"},
}
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        (LLAMA_70B, 70.6, 70.6),
        (MIXTRAL, 46.7, 12.9),
        (DEEPSEEK, 671, 37.5),
        (QWEN3_30B, 30.5, 3.3),
        (GPT2, 0.124, 0.124),
    ],
)
def test_parameters_are_those_that_the_publishers_name(config: dict[str, Any], billions: float, active: float) -> None:
    costs = read_model_costs(config)
    assert costs.num_params / 1e9 == pytest.approx(billions, rel=0.01)
    assert costs.active_params / 1e9 == pytest.approx(active, rel=0.03)


def test_the_cache_takes_what_it_takes() -> None:
    assert read_model_costs(LLAMA_70B).kv_bytes_per_token == 80 * 2 * 8 * 128 * 2
    assert read_model_costs(DEEPSEEK).kv_bytes_per_token == 61 * (512 + 64) * 2
    assert read_model_costs(LLAMA_70B, kv_dtype="float8").kv_bytes_per_token == 80 * 2 * 8 * 128


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "int4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "int8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "float8"),
        ({"torch_dtype": "unheard of"}, "bfloat16"),
    ],
)
def test_weights_have_the_checkpoints_type(change: dict[str, Any], dtype: str) -> None:
    assert read_model_costs({**LLAMA_70B, **change}).weight_dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": "80"}, "num_hidden_layers must be a whole number, is '80'"),
        ({"vocab_size": 0}, "vocab_size must not be 0"),
        ({"num_attention_heads": -1}, "num_attention_heads must be a whole number"),
    ],
)
def test_a_wrong_configuration_is_refused_by_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_model_costs({**LLAMA_70B, **change})


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="can't be read"):
        read_model_costs(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InvalidArgumentError, match="holds no object"):
        read_model_costs(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="is no JSON"):
        read_model_costs(tmp_path)
    with pytest.raises(InvalidArgumentError, match="unknown weight_dtype 'int3'"):
        read_model_costs(LLAMA_70B, weight_dtype="int3")


# ---- hardware -----------------------------------------------------------------------------------------------


def test_every_device_of_the_table_has_a_source_and_its_names() -> None:
    assert {"A100", "A100-80GB", "H100", "H200", "B200", "L4", "MI300X"} <= set(DEVICES)
    for device in DEVICES.values():
        assert device.source
        assert device.flops("bfloat16") > 1e13


def test_a_users_file_adds_and_replaces_devices(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    entry = DEVICES["L4"].model_dump(exclude={"name"})
    file.write_text(json.dumps({"devices": {"MyChip": entry, "H200": {**entry, "memory_gib": 7}}}))
    devices = load_devices(file)
    assert parse_cluster("4xmychip", devices) == Cluster(devices["MYCHIP"], 4)
    assert devices["H200"].memory_gib == 7
    assert devices["A100"] == DEVICES["A100"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is no YAML"),
        ("devices: 3", "`devices` must map names to figures"),
        ("devices: {X: {memory_gib: 1}}", "device X: .*bandwidth_gb_s"),
        ("devices: {X: {memory_gib: -1}}", "device X: .*memory_gib"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        load_devices(tmp_path / "mine.yaml")
    with pytest.raises(NotFoundError, match="can't be read"):
        load_devices(tmp_path / "absent.yaml")


def test_clusters_are_read() -> None:
    assert parse_cluster("8xH200", DEVICES).num_devices == 8
    assert parse_cluster(" 16 x h100-80gb ", DEVICES) == Cluster(DEVICES["H100"], 16)
    assert str(parse_cluster("L4", DEVICES)) == "1xL4"
    for wrong in ("", "8", "0xH200", "9999xH200", "-1xH200", "8xX200"):
        with pytest.raises(InvalidArgumentError) as error:
            parse_cluster(wrong, DEVICES)
        assert error.value.context["field"] == "gpus"


# ---- the roofline -------------------------------------------------------------------------------------------


def roofline(config: dict[str, Any] = LLAMA_70B, device: str = "H200", **layout: int) -> Roofline:
    return Roofline(read_model_costs(config), DEVICES[device], Layout(**layout))


def test_no_step_is_faster_than_the_hardware() -> None:
    device, model = DEVICES["H200"], read_model_costs(LLAMA_70B)
    decode = roofline().decode(1, 100).total
    assert decode > 2 * (model.num_params - model.vocab_size * model.hidden_size) / (device.bandwidth_gb_s * 1e9)
    prefill = roofline().prefill(8192).total
    assert prefill > 2 * (model.num_params - 2 * model.vocab_size * model.hidden_size) * 8192 / device.flops("bfloat16")


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from([LLAMA_70B, MIXTRAL, DEEPSEEK]),
    device=st.sampled_from(["A100", "H200", "L4"]),
    batch_size=st.integers(1, 512),
    num_context=st.integers(1, 50_000),
)
def test_more_work_takes_more_time(config: dict[str, Any], device: str, batch_size: int, num_context: int) -> None:
    here = roofline(config, device)
    assert here.decode(batch_size, num_context).total < here.decode(batch_size + 1, num_context).total
    assert here.decode(batch_size, num_context).total < here.decode(batch_size, num_context + 100).total
    assert here.prefill(num_context).total < here.prefill(num_context + 1).total
    assert here.prefill(num_context, num_cached_tokens=1000).total > here.prefill(num_context).total


def test_sharing_a_layer_is_faster_but_not_for_nothing() -> None:
    alone, shared = roofline().decode(16, 1000), roofline(tp=4).decode(16, 1000)
    assert alone.total / 4 < shared.total < alone.total
    assert alone.collectives == 0 < shared.collectives
    over_network = roofline(config=LLAMA_70B, tp=16).decode(512, 1000)
    assert over_network.collectives > 4 * roofline(tp=8).decode(512, 1000).collectives


def test_a_pipeline_saves_memory_and_not_time() -> None:
    alone, staged = roofline(), roofline(pp=4)
    assert staged.weight_bytes == pytest.approx(alone.weight_bytes / 4)
    assert staged.prefill(1000).total > alone.prefill(1000).total
    assert staged.prefill_busy_s(8192) < alone.prefill_busy_s(8192) / 2  # other work fills the stages


def test_spread_experts_save_memory_and_talk() -> None:
    few, spread = roofline(MIXTRAL, tp=2, adp=4, ep=2), roofline(MIXTRAL, tp=2, adp=4, ep=8)
    assert few.weight_bytes == pytest.approx(spread.weight_bytes)
    assert few.weight_bytes < roofline(MIXTRAL, tp=2).weight_bytes / 2
    assert spread.decode(64, 1000).collectives > roofline(MIXTRAL).decode(64, 1000).collectives


def test_only_experts_that_some_token_chose_are_read() -> None:
    one, many = roofline(DEEPSEEK, tp=8).decode(1, 100), roofline(DEEPSEEK, tp=8).decode(64, 100)
    assert many.linear > 5 * one.linear


def test_an_engine_without_graphs_waits_for_its_launches() -> None:
    model = read_model_costs(LLAMA_70B)
    eager = Roofline(model, DEVICES["H200"], Layout(tp=8), Engine(layer_us=500))
    assert eager.decode(1, 100).total == pytest.approx(80 * 500e-6 + 1e-3)
    assert eager.prefill(8192).total == roofline(tp=8).prefill(8192).total


def test_the_linear_form_is_close_to_the_roofline() -> None:
    """What routers and queues use of a cold engine."""
    for layout in ({"tp": 2}, {"tp": 8}):
        here = roofline(**layout)
        coefficients = here.coefficients()
        for size, context in ((8, 1000), (32, 2000), (64, 4000)):
            exact = here.decode(size, context).total
            assert coefficients.decode_s(size * context, size) == pytest.approx(exact, rel=0.15)
        exact = here.prefill(2048).total
        assert coefficients.prefill_s(2048) == pytest.approx(exact, rel=0.25)
        assert min(coefficients.c0, coefficients.a, coefficients.q, coefficients.k, coefficients.b) >= 0


# ---- plans --------------------------------------------------------------------------------------------------


def plan(config: dict[str, Any] = LLAMA_70B, gpus: str = "8xH200", **objectives: Any) -> Plan:
    return make_plan(read_model_costs(config), parse_cluster(gpus, DEVICES), Objectives(**objectives))


def test_the_chosen_layout_keeps_the_objectives() -> None:
    made = plan(ttft_ms=500, tpot_ms=50)
    assert made.best.is_good
    assert made.best.ttft_ms <= 500
    assert made.best.tpot_ms <= 50
    assert made.best.tokens_per_s == max(item.tokens_per_s for item in made.estimates if item.is_good)
    assert made.best in made.pareto
    assert "DP8" in made.rejected  # 141 GB of weights on each


def test_tighter_objectives_share_layers_among_more_devices() -> None:
    loose, tight = plan(tpot_ms=200), plan(tpot_ms=12)
    assert tight.best.layout.tp > loose.best.layout.tp
    assert tight.best.tokens_per_s < loose.best.tokens_per_s


def test_objectives_out_of_reach_are_said_to_be() -> None:
    made = plan(tpot_ms=1.0)
    assert not made.best.is_good
    assert made.best.layout.tp == 8  # the nearest
    assert explain(made)[0].startswith(
        "No layout keeps a token every 1 ms, even for one request at a time. The nearest: "
    )


def test_small_models_are_copied() -> None:
    assert plan(GPT2).best.layout == Layout(dp=8)


def test_experts_are_spread_where_it_pays() -> None:
    assert plan(DEEPSEEK, "16xH200", tpot_ms=50).best.layout.ep > 1


def test_what_does_not_fit_says_what_is_missing() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"does not fit on 1xL4: the best layout lacks 1\d\d\.\d GiB a device"
    ):
        plan(gpus="1xL4")


@pytest.mark.parametrize("strategies", [["TP"], ["DP"], ["PP"], ["TP", "PP"], ["TP", "PP", "Hybrid"]])
def test_only_supported_kinds_are_used(strategies: list[Any]) -> None:
    config = ParallelismConfig(supported_strategies=strategies)
    model, cluster = read_model_costs(LLAMA_70B, weight_dtype="int4"), parse_cluster("8xH200", DEVICES)
    made = make_plan(model, cluster, config=config)
    used = {name for item in made.estimates for name in item.layout.strategies}
    assert used <= set(strategies)
    assert used == set(strategies) or "Hybrid" not in strategies


def test_without_optimisation_the_smallest_layout_is_taken() -> None:
    config = ParallelismConfig(auto_optimize=False)
    made = make_plan(read_model_costs(LLAMA_70B), parse_cluster("8xH200", DEVICES), config=config)
    assert made.best.layout.devices_per_replica == 2
    assert made.best.layout.dp == 4


@settings(max_examples=40, deadline=None)
@given(
    config=st.sampled_from([LLAMA_70B, MIXTRAL, QWEN3_30B, DEEPSEEK]),
    num_devices=st.integers(1, 40),
    device=st.sampled_from(["H200", "B200", "A100"]),
    ttft_ms=st.none() | st.floats(50, 5000),
    tpot_ms=st.none() | st.floats(5, 200),
)
def test_plans_hold_together(
    config: dict[str, Any], num_devices: int, device: str, ttft_ms: float | None, tpot_ms: float | None
) -> None:
    cluster = Cluster(DEVICES[device], num_devices)
    objectives = Objectives(ttft_ms, tpot_ms)
    try:
        made = make_plan(read_model_costs(config), cluster, objectives)
    except InvalidArgumentError as error:
        assert "does not fit" in error.message  # noqa: PT017 - a plan or this
        return
    costs = made.model
    for item in made.estimates:
        layout = item.layout
        assert layout.num_devices <= num_devices
        assert costs.num_heads % layout.tp == costs.num_layers % layout.pp == 0
        assert layout.tp * layout.adp == layout.ep * layout.expert_tp
        assert item.num_kv_tokens >= item.batch_size * (1024 + 256)
        assert 0 < item.tpot_ms < float("inf")
        assert item.tokens_per_s == pytest.approx(item.requests_per_s * 256)
    assert made.pareto
    assert not any(other.dominates(item) for item in made.pareto for other in made.estimates)
    json.dumps(as_json(made), allow_nan=False)


def test_objectives_are_checked() -> None:
    for field, value in (("ttft_ms", 0), ("tpot_ms", -1), ("num_input_tokens", 0), ("hit_rate", 1.0)):
        with pytest.raises(InvalidArgumentError, match=field) as error:
            Objectives(**{field: value})
        assert error.value.context["field"] == field


def test_a_warm_prefix_cache_serves_more() -> None:
    cold, warm = plan(ttft_ms=500, tpot_ms=50), plan(ttft_ms=500, tpot_ms=50, hit_rate=0.8)
    assert warm.best.tokens_per_s > 1.2 * cold.best.tokens_per_s


# ---- against measurements -----------------------------------------------------------------------------------


def test_errors_against_measured_latencies_are_those_of_the_documentation(shared: Path) -> None:
    from measured_latencies import distserve, held_out_errors, splitwise

    points = distserve("distserve")
    for phase, bound in (("prefill", 0.10), ("decode", 0.12)):
        assert median(abs(point.error(Engine())) for point in points if point.phase == phase) < bound
    for device in ("A100", "H100"):
        measured = splitwise(device)
        assert -0.4 < median(point.error(Engine()) for point in measured) < 0  # engines of 2023 were slower
        assert median(abs(error) for error in held_out_errors(measured)) < 0.30


def test_the_size_of_the_cache_is_that_of_a_real_engine(shared: Path) -> None:
    from measured_latencies import cache_sizes

    errors = [error for layout, error in cache_sizes() if layout.pp == 1]
    assert median(abs(error) for error in errors) < 0.1
    assert max(errors) < 0.02  # never more than there was
