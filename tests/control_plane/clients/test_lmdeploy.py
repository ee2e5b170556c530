"""LMDeploy's client over an engine with LMDeploy's signatures and habits; the signatures are checked where it is."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import fake_lmdeploy
from fake_lmdeploy import AsyncEngine, ErrorCode, install
from sagellm_control_plane.clients.base import EngineLostError
from sagellm_control_plane.clients.lmdeploy import LMDeployEngineClient
from sagellm_core.config import LLMEngineConfig
from sagellm_core.engine_core.report import EngineReport
from sagellm_core.models import resolve_model
from sagellm_core.tokenizer import load_tokenizer
from sagellm_protocol import (
    FinishReason,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    Request,
    ResumePoint,
    SamplingParams,
    StreamEvent,
    StreamEventEnd,
    StructuredOutput,
    TokenizeRequest,
    UnavailableError,
    UnsupportedError,
)

TEXT = " Once upon a time there was a small engine that lived in a cluster."


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of the engine's answer, behind which it goes on with the same."""
    install(monkeypatch)
    tokenizer = load_tokenizer(resolve_model("builtin"))
    script = tokenizer.encode(TEXT, add_special_tokens=False)
    monkeypatch.setattr(AsyncEngine, "script", script)
    monkeypatch.setattr(AsyncEngine, "eos_token_id", tokenizer.eos_token_id)
    return script


def make_client(**options: Any) -> LMDeployEngineClient:
    config = {"model_path": "builtin", "engine_id": "l0", "max_batch_size": 2, "max_model_len": 256}
    return LMDeployEngineClient(LLMEngineConfig(**{**config, **options.pop("config", {})}), **options)


@pytest.fixture
async def client() -> AsyncIterator[LMDeployEngineClient]:
    client = make_client()
    with pytest.raises(UnavailableError, match="call start"):
        await client.stats()
    await client.start()
    await client.start()
    yield client
    engine = engine_of(client)
    assert not engine.session_mgr.sessions
    assert engine.num_running == 0
    await client.stop()
    await client.stop()
    assert engine.is_closed


def engine_of(client: LMDeployEngineClient) -> AsyncEngine:
    engine = client._engine
    assert isinstance(engine, AsyncEngine)
    return engine


async def events_of(client: LMDeployEngineClient, **values: Any) -> list[StreamEvent]:
    request = Request(**{"prompt": "Tell me", "stream": True, **values})
    return [event async for event in client.stream(request)]


async def end_of(client: LMDeployEngineClient, **values: Any) -> StreamEventEnd:
    end = (await events_of(client, **values))[-1]
    assert isinstance(end, StreamEventEnd)
    return end


async def until_running(client: LMDeployEngineClient, number: int) -> None:
    while engine_of(client).num_running < number:
        await asyncio.sleep(0.001)


async def test_a_stream_has_a_start_deltas_and_one_end(client: LMDeployEngineClient, package: list[int]) -> None:
    start, *deltas, end = await events_of(client, max_tokens=len(package), request_id="r-1", trace_id="t-1")
    assert start.event == "start"
    assert start.prompt_tokens == len(await client.tokenize(TokenizeRequest(prompt="Tell me")))
    assert isinstance(end, StreamEventEnd)
    assert "".join(delta.chunk for delta in deltas) == end.output_text  # type: ignore[union-attr]
    assert end.output_text.strip() == TEXT.strip()
    assert end.output_tokens == package
    assert (end.finish_reason, end.engine_id, end.trace_id) == (FinishReason.LENGTH, "l0", "t-1")
    assert end.metrics.ttft_ms > 0
    response = await client.execute(Request(prompt="Tell me", max_tokens=len(package), model="m"))
    assert (response.output_tokens, response.model) == (package, "m")
    stats = await client.stats()
    assert (stats.num_output_tokens, stats.kv_usage) == (2 * len(package), 0.25)


async def test_parameters_in_lmdeploys_words(client: LMDeployEngineClient) -> None:
    sampling = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=5, min_tokens=2, max_tokens=3,
        stop_token_ids=[4000],
    )  # fmt: skip
    end = await end_of(client, sampling_params=sampling, lora="poems")
    config = engine_of(client).configs[-1]
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (0.7, 0.9, 7, 0.1)
    assert (config.repetition_penalty, config.random_seed, config.do_sample) == (1.2, 5, True)
    assert (config.min_new_tokens, config.max_new_tokens) == (2, 3)
    assert set(config.stop_token_ids or ()) == {4000, AsyncEngine.eos_token_id}
    assert engine_of(client).adapters == ["poems"]
    assert end.usage.completion_tokens == 3

    await end_of(client, max_tokens=1)
    config = engine_of(client).configs[-1]
    assert (config.do_sample, config.top_k, config.min_new_tokens) == (False, 1, None)
    await end_of(client, sampling_params=SamplingParams(max_tokens=1, repetition_penalty=1.1))
    config = engine_of(client).configs[-1]
    assert (config.do_sample, config.top_k, config.temperature) == (True, 1, 1.0)  # the best of one
    # What is not given is what fits; a seed that was not given is told.
    start, *_ = await events_of(client, sampling_params=SamplingParams(temperature=1.0, max_tokens=5000))
    assert engine_of(client).configs[-1].max_new_tokens == 256 - start.prompt_tokens  # type: ignore[union-attr]
    assert engine_of(client).configs[-1].random_seed == start.seed  # type: ignore[union-attr]


async def test_a_token_ends_the_answer_and_is_one_of_its_tokens(
    client: LMDeployEngineClient, package: list[int]
) -> None:
    end = await end_of(client, sampling_params=SamplingParams(max_tokens=50, stop_token_ids=[package[4]]))
    assert (end.finish_reason, end.stop_reason) == (FinishReason.STOP, package[4])
    assert end.output_tokens == package[: package.index(package[4]) + 1]
    AsyncEngine.script[3:] = [AsyncEngine.eos_token_id]
    end = await end_of(client, max_tokens=50)
    assert (end.finish_reason, end.stop_reason, len(end.output_tokens)) == (FinishReason.STOP, None, 4)
    end = await end_of(client, sampling_params=SamplingParams(max_tokens=9, ignore_eos=True))
    assert (end.finish_reason, len(end.output_tokens)) == (FinishReason.LENGTH, 9)


async def test_a_stop_string_of_several_tokens_ends_it(client: LMDeployEngineClient) -> None:
    end = await end_of(client, sampling_params=SamplingParams(max_tokens=200, stop=["small eng"]))
    assert (end.finish_reason, end.stop_reason) == (FinishReason.STOP, "small eng")
    assert end.output_text.endswith("there was a ")
    assert engine_of(client).num_cancelled == 1


async def test_log_probabilities(client: LMDeployEngineClient, package: list[int]) -> None:
    end = await end_of(client, sampling_params=SamplingParams(max_tokens=2, logprobs=2))
    entry = (end.outputs[0].logprobs or [])[0]
    assert (entry.token_id, entry.logprob, entry.rank) == (package[0], -9.0, None)
    assert [(top.token_id, top.rank) for top in entry.top] == [(package[0] + 1, 1), (package[0] + 2, 2)]
    end = await end_of(client, sampling_params=SamplingParams(max_tokens=2, logprobs=0))
    assert [(entry.logprob, entry.top) for entry in end.outputs[0].logprobs or ()] == [(-9.0, [])] * 2


async def test_forms(client: LMDeployEngineClient) -> None:
    wanted: dict[str, Any] = {
        "json_object": True,
        "json_schema": {"type": "integer"},
        "regex": "[ab]+",
        "choice": ["yes (1)", "no"],
    }
    expected = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "integer"}}},
        {"type": "regex_schema", "regex_schema": "[ab]+"},
        {"type": "regex_schema", "regex_schema": r"(yes \(1\)|no)"},
    ]
    for name, value in wanted.items():
        await end_of(client, max_tokens=1, structured_output=StructuredOutput.model_validate({name: value}))
    assert [config.response_format for config in engine_of(client).configs] == expected


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"sampling_params": SamplingParams(num_beams=2)}, "strategy"),
        ({"sampling_params": SamplingParams(n=2, temperature=1.0)}, "n"),
        ({"sampling_params": SamplingParams(presence_penalty=0.5)}, "presence_penalty"),
        ({"sampling_params": SamplingParams(frequency_penalty=0.5)}, "frequency_penalty"),
        ({"sampling_params": SamplingParams(logit_bias={1: 2.0})}, "logit_bias"),
        ({"sampling_params": SamplingParams(prompt_logprobs=1)}, "prompt_logprobs"),
        ({"sampling_params": SamplingParams(ignore_eos=True, stop_token_ids=[3])}, "stop_token_ids"),
        ({"structured_output": StructuredOutput(grammar="start: /a/")}, "structured_output.grammar"),
        ({"resume_from": ResumePoint(output_token_ids=[[5]], seed=1)}, "resume_from"),
        ({"embed": {}, "stream": False}, "embed"),
        ({"cache_salt": "mine"}, "cache_salt"),
    ],
)
async def test_what_it_cannot_do_is_said(client: LMDeployEngineClient, values: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        await end_of(client, **values)
    assert caught.value.context["field"] == field
    assert not engine_of(client).configs


async def test_a_prompt_that_leaves_no_room(client: LMDeployEngineClient) -> None:
    with pytest.raises(InvalidArgumentError, match="maximum context length is 256"):
        await end_of(client, prompt=[5] * 256)


async def test_an_abort_reaches_a_request_that_waits_for_a_handle(client: LMDeployEngineClient) -> None:
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    tasks = [
        asyncio.ensure_future(events_of(client, sampling_params=sampling, request_id=f"r-{number}"))
        for number in range(3)
    ]
    await until_running(client, 2)  # two handles: the third waits
    while client._num_output_tokens < 4:
        await asyncio.sleep(0.001)
    assert (await client.stats()).num_waiting == 1
    with pytest.raises(InvalidArgumentError, match="already running"):
        await end_of(client, request_id="r-0")
    for number in (2, 0):
        client.abort(f"r-{number}")
        end = (await tasks[number])[-1]
        assert isinstance(end, StreamEventEnd)
        assert end.finish_reason is FinishReason.ABORT
        assert (end.usage.completion_tokens > 0) is (number == 0)
    with pytest.raises(NotFoundError):
        client.abort("r-2")
    await client.stop()  # with the last one under way
    end = (await tasks[1])[-1]
    assert isinstance(end, StreamEventEnd)
    assert end.finish_reason is FinishReason.ABORT
    await client.start()


async def test_leaving_a_stream_and_cancelling_its_reader_free_the_request(client: LMDeployEngineClient) -> None:
    request = Request(prompt="Once", stream=True, sampling_params=SamplingParams(max_tokens=200))
    async with aclosing(client.stream(request)) as events:
        async for event in events:
            if event.event == "delta":
                break
    assert engine_of(client).num_cancelled == 1
    task = asyncio.ensure_future(events_of(client, max_tokens=200))
    await until_running(client, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):  # though LMDeploy has kept it to itself
        await task
    assert (await client.stats()).num_running == 0


async def test_its_errors_in_our_words(client: LMDeployEngineClient) -> None:
    engine = engine_of(client)
    for code, kind in (
        (ErrorCode.CONTEXT_LENGTH_EXCEEDED, InvalidArgumentError),
        (ErrorCode.UNSUPPORTED_FEATURE, UnsupportedError),
        (ErrorCode.INTERNAL_ERROR, InternalError),
    ):
        engine.fails_with = code
        with pytest.raises(kind):
            await end_of(client)
    engine.fails_with = None


async def test_an_engine_that_dies_is_lost_and_the_next_start_makes_another(client: LMDeployEngineClient) -> None:
    first = engine_of(client)
    task = asyncio.ensure_future(end_of(client, max_tokens=200))
    await until_running(client, 1)
    first.fails_with = ErrorCode.ENGINE_UNAVAILABLE
    with pytest.raises(EngineLostError):
        await task
    assert not await client.health_check()
    with pytest.raises(EngineLostError):
        await end_of(client)
    await client.start()
    assert first.is_closed
    assert await client.health_check()
    engine_of(client).health = {"status": "unhealthy", "message": "its loop has ended"}
    assert not await client.health_check()
    await client.start()
    assert (await end_of(client, max_tokens=1)).usage.completion_tokens == 1


async def test_drain_refuses_until_resumed(client: LMDeployEngineClient) -> None:
    await client.drain()
    with pytest.raises(UnavailableError, match="draining"):
        await end_of(client)
    client.resume()
    assert (await end_of(client, max_tokens=1)).error is None


async def test_what_it_tells(client: LMDeployEngineClient) -> None:
    reports: list[EngineReport] = []
    end = client.watch(reports.append, interval_s=0.001)
    while len(reports) < 3:
        await asyncio.sleep(0.001)
    end()
    assert [report.sequence for report in reports[:3]] == [0, 1, 2]
    description = await client.describe_model()
    assert (description.vocab_size, description.max_model_len, description.quantization) == (4096, 256, "awq")
    assert not await client.reset_prefix_cache()
    assert client.get_info()["backend"] == "lmdeploy"
    ids = await client.tokenize(TokenizeRequest(prompt="Once upon"))
    assert (await client.detokenize(ids, skip_special_tokens=True)).strip() == "Once upon"
    assert len(await client.token_texts(ids)) == len(ids)
    chat = await client.tokenize(TokenizeRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}]}))
    assert "Hi" in await client.detokenize(chat)


async def test_its_configuration() -> None:
    client = make_client(config={"dtype": "bf16"}, engine_args={"max_prefill_token_num": 64, "tp": 2})
    await client.start()
    options = engine_of(client).backend_config
    assert (options.dtype, options.tp, options.session_len, options.max_batch_size) == ("bfloat16", 2, 256, 2)
    assert (options.max_prefill_token_num, options.logprobs_mode) == (64, "raw_logprobs")
    await client.stop()
    client = make_client(backend="turbomind")
    await client.start()
    assert type(engine_of(client).backend_config) is fake_lmdeploy.TurbomindEngineConfig
    await client.stop()
    with pytest.raises(UnsupportedError, match="no dtype fp32"):
        await make_client(config={"dtype": "fp32"}).start()


async def test_a_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client()
    monkeypatch.setattr(AsyncEngine, "broken", "no GPU")
    with pytest.raises(UnavailableError, match="no GPU"):
        await client.start()
    monkeypatch.setitem(sys.modules, "lmdeploy.messages", None)
    with pytest.raises(UnsupportedError, match="isagellm\\[lmdeploy\\]"):
        await client.start()


async def test_a_start_that_is_given_up_closes_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, made = threading.Event(), []

    class SlowEngine(AsyncEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            goes_on.wait(30)
            super().__init__(*args, **options)

    monkeypatch.setattr(sys.modules["lmdeploy.serve.core.async_engine"], "AsyncEngine", SlowEngine)
    client = make_client()
    task = asyncio.ensure_future(client.start())
    while not made:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    goes_on.set()
    await client.start()  # which waits until there is room
    assert [engine.is_closed for engine in made] == [True, False]
    await client.stop()


# ---- the real one ----------------------------------------------------------------------------------------


def definitions(folder: Path, path: str) -> dict[str, ast.ClassDef]:
    """The classes of one of its files; read, because to import it takes a GPU's libraries."""
    tree = ast.parse((folder / path).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def parameters(found: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [argument.arg for argument in found.args.args]


def test_the_fake_has_the_signatures_of_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    spec = importlib.util.find_spec("lmdeploy")
    if spec is None or spec.origin is None:
        pytest.skip("needs the extra lmdeploy: pip install 'isagellm[lmdeploy]'")
    folder = Path(spec.origin).parent
    core = definitions(folder, "serve/core/async_engine.py")
    real = {**core, **definitions(folder, "messages.py"), **definitions(folder, "serve/managers/session_manager.py")}
    errors = definitions(folder, "serve/core/exceptions.py")
    assert "RequestError" in errors
    known = {node.targets[0].id for node in errors["ErrorCode"].body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    assert {code.name for code in ErrorCode} <= known
    for name, own in vars(fake_lmdeploy).items():
        if not inspect.isclass(own) or own.__module__ != fake_lmdeploy.__name__ or name not in real:
            continue
        methods = {
            node.name: node for node in real[name].body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        if is_dataclass(own) and name != "Session":
            attributes = {node.target.id for node in real[name].body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
            assert {field.name for field in fields(own)} <= attributes, name
            continue
        for method, function in inspect.getmembers(own, inspect.isfunction):
            if (method.startswith("_") and method != "__init__") or name == "Session":
                continue
            given = [
                key
                for key, value in inspect.signature(function).parameters.items()
                if value.kind is not value.VAR_KEYWORD
            ]
            assert given == parameters(methods[method]), f"{name}.{method}"
