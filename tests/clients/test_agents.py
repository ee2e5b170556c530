"""Agent frameworks: their loops over tools, streams, and answers in a form, by both of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from agent_engine import AgentEngine
from live_server import serving
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway import create_app

pytestmark = pytest.mark.slow

SUNNY = "It is said: sunny in Bern"


class Report(BaseModel):
    city: str


def get_weather(city: str) -> str:
    """The weather at a place."""
    return f"sunny in {city}"


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """Where OpenAI's clients find a model that calls its tools."""
    manager = ControlPlaneManager()
    manager.register_engine(AgentEngine(max_model_len=4096), engine_id="agent", model="m")
    async with serving(create_app(manager, default_model="m")) as address:
        yield f"{address}/v1"


@pytest.fixture
async def client(url: str) -> AsyncIterator[Any]:
    """OpenAI's own, which the frameworks call through: closed with the test."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("kind", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
async def test_openai_agents(client: Any, kind: str) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    agents.set_tracing_disabled(True)

    def agent(**options: Any) -> Any:
        return agents.Agent(model=getattr(agents, kind)(model="m", openai_client=client), **options)

    tools = [agents.function_tool(get_weather)]
    answer = await agents.Runner.run(agent(name="a", tools=tools), "How is it?")
    assert answer.final_output == SUNNY
    formed = await agents.Runner.run(agent(name="a", tools=tools, output_type=Report), "How is it?")
    assert formed.final_output == Report(city="Bern")
    stream = agents.Runner.run_streamed(agent(name="a", tools=tools, output_type=Report), "How is it?")
    assert [event async for event in stream.stream_events()]
    assert stream.final_output == Report(city="Bern")
    handed = await agents.Runner.run(agent(name="a", handoffs=[agent(name="Bob")]), "Hand over.")
    assert handed.last_agent.name == "Bob"


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
async def test_pydantic_ai(client: Any, kind: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    model = getattr(models, kind)("m", provider=OpenAIProvider(openai_client=client))
    outputs = {
        "text": (str, SUNNY),
        "tool": (Report, Report(city="Bern")),
        "native": (pydantic_ai.NativeOutput(Report), Report(city="Bern")),
        "prompted": (pydantic_ai.PromptedOutput(Report), Report(city="Bern")),
    }
    for name, (output_type, expected) in outputs.items():
        agent = pydantic_ai.Agent(model, output_type=output_type, tools=[get_weather], retries=0)
        answer = await agent.run("How is it?")
        assert answer.output == expected, name
        async with agent.run_stream("How is it?") as stream:
            assert await stream.get_output() == expected, name


async def test_llama_index(url: str) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like", reason="llama-index-llms-openai-like is not installed")
    import httpx
    from llama_index.core.agent.workflow import FunctionAgent

    async with httpx.AsyncClient() as http:
        model = like.OpenAILike(
            model="m",
            api_base=url,
            api_key="any",
            is_chat_model=True,
            is_function_calling_model=True,
            should_use_structured_outputs=True,
            max_retries=0,
            async_http_client=http,
        )
        agent = FunctionAgent(tools=[get_weather], llm=model)
        assert str(await agent.run("How is it?")) == SUNNY
        formed = await model.as_structured_llm(Report).acomplete("How is it?")
        assert formed.raw == Report(city="Bern")
