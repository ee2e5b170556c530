"""Embedding models in the engine: texts in, vectors out, through the scheduler that all requests take."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder_zoo import build_encoder, embedding_files
from sagellm_core import LLMEngine
from sagellm_protocol import EmbedParams, InvalidArgumentError, Request, SamplingParams
from small_tokenizers import CORPUS
from tiny_engine import make_engine

TEXTS = CORPUS[:5]
LONG = " ".join(["token cache blocks model"] * 40)


def make(folder: Path, **fields: Any) -> LLMEngine:
    return make_engine(folder, **{"max_model_len": 64, **fields})


async def embed(folder: Path, inputs: Any, **options: Any) -> list[list[float]]:
    async with make(folder, **options) as engine:
        return await engine.embed(inputs)


def expected_rows(reference: Any, folder: Path, text: str) -> torch.Tensor:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    with torch.no_grad():
        rows: torch.Tensor = reference(torch.tensor([ids])).last_hidden_state[0]
    return rows


@pytest.mark.parametrize("name", ["bert", "xlm-roberta-masked", "nomic_bert"])
async def test_vectors_are_normalised_means_of_all_rows(name: str, tmp_path: Path) -> None:
    reference = build_encoder(name, tmp_path)
    for text, vector in zip(TEXTS, await embed(tmp_path, TEXTS), strict=True):
        expected = torch.nn.functional.normalize(expected_rows(reference, tmp_path, text).mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=1e-4)


async def test_checkpoints_say_how_vectors_are_made(tmp_path: Path) -> None:
    reference = build_encoder("bert", tmp_path)
    embedding_files(tmp_path, "cls_token", normalize=False)
    (vector,) = await embed(tmp_path, TEXTS[0])
    expected = expected_rows(reference, tmp_path, TEXTS[0])[0]
    torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-4, rtol=1e-4)
    # As newer files of sentence-transformers say it.
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    (vector,) = await embed(tmp_path, TEXTS[0])
    expected = expected_rows(reference, tmp_path, TEXTS[0])[-1]
    torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 64},
        {"max_batch_size": 2},
        {"prefill_chunk_size": 4},
        {"enable_prefix_caching": True},
        {"num_kv_blocks": 1},
        {"block_size": 5},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_vectors_do_not_depend_on_company(tmp_path: Path, options: dict[str, Any]) -> None:
    build_encoder("bert", tmp_path)
    rng = random.Random(0)
    inputs = [[rng.randrange(5, 250) for _ in range(rng.randrange(1, 64))] for _ in range(20)]
    alone = [(await embed(tmp_path, [token_ids]))[0] for token_ids in inputs[:3]]
    vectors = await embed(tmp_path, inputs * 2, **options)
    assert vectors[:3] == vectors[20:23] == alone


async def test_longest_texts(tmp_path: Path) -> None:
    build_encoder("roberta", tmp_path)
    embedding_files(tmp_path, "mean_tokens", max_seq_length=24)
    async with make_engine(tmp_path, max_model_len=24) as engine:
        assert len(await engine.embed([[7] * 24])) == 1
        with pytest.raises(InvalidArgumentError, match="tokens, the model takes 24"):
            await engine.embed(LONG)
    with pytest.raises(InvalidArgumentError, match="max_model_len is 25, the model takes 24"):
        await make_engine(tmp_path, max_model_len=25).start()


@pytest.mark.parametrize("limit", [-1, 10])
async def test_cut_texts_keep_their_frame(tmp_path: Path, limit: int) -> None:
    build_encoder("bert", tmp_path)
    async with make(tmp_path) as engine:
        request = Request(prompt=LONG, embed=EmbedParams(truncate_prompt_tokens=limit))
        response = await engine.execute(request)
        length = 64 if limit == -1 else limit
        words = engine.tokenizer.encode(LONG, add_special_tokens=False)[: length - 2]
        first, *_, last = engine.tokenizer.encode(LONG)
        assert [engine.tokenizer.id_to_token(token_id) for token_id in (first, last)] == ["[CLS]", "[SEP]"]
        assert response.usage.prompt_tokens == length
        assert [response.embedding] == await engine.embed([[first, *words, last]])
        short = await engine.execute(request.model_copy(update={"prompt": TEXTS[0][:3], "request_id": "short"}))
        assert [short.embedding] == await engine.embed(TEXTS[0][:3])


async def test_no_text_is_made(tmp_path: Path) -> None:
    build_encoder("bert", tmp_path)
    async with make(tmp_path) as engine:
        for call in (
            engine.generate("x"),
            engine.generate(messages=[{"role": "user", "content": "x"}], sampling_params=SamplingParams(n=2)),
            anext(engine.stream("x")),
        ):
            with pytest.raises(InvalidArgumentError, match="makes vectors of texts, no text") as error:
                await call
            assert error.value.context["field"] == "model"


async def test_what_is_told_of_the_model(tmp_path: Path) -> None:
    build_encoder("bert", tmp_path)
    async with make(tmp_path) as engine:
        model = await engine.describe_model()
        assert (model.is_embedding, model.hidden_size, model.max_model_len) == (True, 64, 64)
        assert model.architecture == "BertModel"
        assert model.chat_template is None
        assert model.special_tokens["cls_token"] == "[CLS]"
        assert engine.get_info()["kv_bytes_per_token"] == 0


async def test_nothing_is_held_when_all_is_done(tmp_path: Path) -> None:
    build_encoder("bert", tmp_path)
    async with make(tmp_path, max_batch_size=3) as engine:
        asking = [asyncio.ensure_future(engine.embed(text)) for text in TEXTS * 4]
        await asyncio.sleep(0)
        asking[3].cancel()
        done = await asyncio.gather(*asking, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in done) == 1
        stats = await engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
