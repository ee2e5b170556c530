"""What an engine tells of its model and tokens, and the control plane after it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from sagellm_control_plane import ControlPlaneManager
from sagellm_core import LLMEngine, LLMEngineConfig
from sagellm_protocol import InvalidArgumentError, NotFoundError, TokenizeRequest, UnavailableError

QUESTION = [{"role": "user", "content": "What is a token?"}]


@pytest.fixture
async def engine() -> AsyncIterator[LLMEngine]:
    async with LLMEngine(LLMEngineConfig(model_path="builtin", backend_type="cpu", num_kv_blocks=256)) as engine:
        yield engine


async def test_a_text_comes_back(engine: LLMEngine) -> None:
    text = "Once upon a time, 推理."
    token_ids = await engine.tokenize(TokenizeRequest(prompt=text))
    assert await engine.detokenize(token_ids, skip_special_tokens=True) == text
    assert "".join(await engine.token_texts(token_ids)).endswith(".")


async def test_a_conversation_counts_as_the_engine_counts_it(engine: LLMEngine) -> None:
    token_ids = await engine.tokenize(TokenizeRequest.model_validate({"messages": QUESTION}))
    response = await engine.generate(messages=QUESTION, max_tokens=1)
    assert response.usage.prompt_tokens == len(token_ids)
    shorter = TokenizeRequest.model_validate({"messages": QUESTION, "add_generation_prompt": False})
    assert len(await engine.tokenize(shorter)) < len(token_ids)


async def test_the_description(engine: LLMEngine) -> None:
    model = await engine.describe_model()
    assert model.model == "builtin"
    assert model.vocab_size == engine.model_config.spec.vocab_size
    assert model.chat_template
    assert model.weight_bytes > 0
    assert not model.is_embedding


def test_a_request_has_a_text_or_messages() -> None:
    with pytest.raises(InvalidArgumentError, match="either prompt or messages"):
        TokenizeRequest.model_validate({"prompt": "x", "messages": QUESTION})


async def test_the_control_plane_asks_the_engine_of_the_model(engine: LLMEngine) -> None:
    manager = ControlPlaneManager()
    manager.register_engine(engine, model="little")
    await manager.start()
    assert (await manager.describe_model("little")).model == "little"
    token_ids = await manager.tokenize("little", prompt="Hello there")
    assert "Hello there" in await manager.detokenize("little", token_ids)
    assert len(await manager.token_texts("little", token_ids)) == len(token_ids)
    with pytest.raises(InvalidArgumentError, match="no token id"):
        await manager.detokenize("little", [10**6])
    with pytest.raises(NotFoundError, match="little"):
        await manager.tokenize("large", prompt="x")


async def test_a_stopped_control_plane_says_so() -> None:
    manager = ControlPlaneManager()
    manager.register_engine(LLMEngine(LLMEngineConfig(model_path="builtin")), model="little")
    await manager.stop()
    with pytest.raises(UnavailableError, match="start"):
        await manager.tokenize("little", prompt="x")
