"""Chunks add up to `decode`, never cut a character, and come at constant cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from sagellm_core.detokenizer import IncrementalDetokenizer, token_text
from sagellm_core.tokenizer import FastBackend, Tokenizer

GetTokenizer = Callable[[str], Tokenizer]

TRAINED = ["byte_level", "sentencepiece"]
SHARED = ["tokenizers/qwen3", "tokenizers/gpt2", "models/stories260K"]
TEXTS = [
    "Hello, world!",
    " leading and  double spaces ",
    "你好，世界！今天天气怎么样？",
    "emoji 👋🏽 👨‍👩‍👧‍👦 🇨🇳 ❤️",
    "combining é ȩ̃ क्षि ที่",
    "zero\x00width\u200b\ufeff and \ufffd itself",
    "<s>special</s><|im_end|>text",
    "",
]
# A fixture that only looks tokenizers up may be shared by all examples.
PROPERTY = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def stream(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    chunks, start = [], 0
    for size in cuts:
        chunks.append(detokenizer.add(ids[start : start + size]))
        start += size
    chunks.append(detokenizer.add(ids[start:]))
    return [*chunks, detokenizer.flush()]


@pytest.mark.parametrize("name", TRAINED + SHARED)
@given(data=st.data())
@PROPERTY
def test_random_ids_add_up_to_decode(tokenizers_by_name: GetTokenizer, name: str, data: st.DataObject) -> None:
    tokenizer = tokenizers_by_name(name)
    # Low ids are where bytes and special tokens are; ids beyond the vocabulary must not disturb.
    token_id = st.one_of(st.integers(0, 300), st.integers(0, tokenizer.vocab_size + 3))
    ids = data.draw(st.lists(token_id, max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 4), max_size=20))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", TRAINED + SHARED)
@given(text=st.text(max_size=40), skip=st.booleans())
@PROPERTY
def test_random_text_is_never_cut_inside_a_character(
    tokenizers_by_name: GetTokenizer, name: str, text: str, skip: bool
) -> None:
    tokenizer = tokenizers_by_name(name)
    ids = tokenizer.encode(text)
    chunks = stream(tokenizer, ids, [1] * len(ids), skip)
    assert "".join(chunks) == tokenizer.decode(ids, skip)
    if "\ufffd" not in tokenizer.decode(ids, skip):
        assert not any("\ufffd" in chunk for chunk in chunks)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TRAINED + SHARED)
def test_texts_of_many_scripts(tokenizers_by_name: GetTokenizer, name: str, text: str) -> None:
    tokenizer = tokenizers_by_name(name)
    ids = tokenizer.encode(text)
    for skip in (True, False):
        chunks = stream(tokenizer, ids, [1] * len(ids), skip)
        assert "".join(chunks) == tokenizer.decode(ids, skip)


def test_a_character_of_several_tokens_comes_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("👋")
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(byte_level)
    assert [detokenizer.add([token_id]) for token_id in ids] == ["", "", "", "👋"]


def test_flush_releases_an_incomplete_character_as_decode_does(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = [*tokenizer.encode("ok "), *tokenizer.encode("👋")[:-1]]
        detokenizer = IncrementalDetokenizer(tokenizer)
        text = detokenizer.add(ids)
        assert "\ufffd" not in text
        tail = detokenizer.flush()
        assert "\ufffd" in tail
        assert text + tail == tokenizer.decode(ids)


def test_space_is_stripped_at_the_start_only(sentencepiece: Tokenizer) -> None:
    space = sentencepiece.token_to_id("▁")
    bos = sentencepiece.bos_token_id
    assert space is not None
    assert bos is not None
    ids = [bos, space, bos, space]
    assert stream(sentencepiece, ids, [1, 1, 1, 1], True) == ["", "", "", " ", "", ""]
    assert sentencepiece.decode(ids) == " "


def test_byte_run_spoilt_by_one_byte_equals_decode(sentencepiece: Tokenizer) -> None:
    byte_ids = [sentencepiece.token_to_id(f"<0x{byte:02X}>") for byte in (*"你".encode(), 0xFF)]
    ids = [token_id for token_id in byte_ids if token_id is not None]
    assert "".join(stream(sentencepiece, ids, [1] * 4, True)) == sentencepiece.decode(ids) == "\ufffd" * 4


DECODERS = [
    None,
    decoders.Metaspace(),
    decoders.Metaspace(prepend_scheme="never"),
    decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]),
    decoders.Strip("a", 1, 0),
    decoders.Sequence([decoders.Fuse(), decoders.Strip("a", 2, 0)]),
    decoders.Replace("b", " "),
]
WINDOWED = [decoders.WordPiece(prefix="##"), decoders.BPEDecoder(suffix="c"), decoders.Strip("a", 1, 1)]
WORDS = ["a", "aa", "b", "bb", "▁", "▁a", "▁▁b", "##c", "c", "<0x61>", "<0xE4>", "<0xBD>", "<0xA0>", "<0x+9>", "你"]


def word_tokenizer(decoder: Any) -> Tokenizer:
    backend = RustTokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(FastBackend(backend))


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@given(ids=st.lists(st.integers(0, len(WORDS) - 1), max_size=12), cuts=st.lists(st.integers(0, 3), max_size=8))
@PROPERTY
def test_every_incremental_step_equals_the_real_decoder(decoder: Any, ids: list[int], cuts: list[int]) -> None:
    tokenizer = word_tokenizer(decoder)
    assert "".join(stream(tokenizer, ids, cuts, True)) == tokenizer.decode(ids)


@pytest.mark.parametrize("decoder", WINDOWED, ids=str)
def test_other_decoders_use_a_window(decoder: Any) -> None:
    tokenizer = word_tokenizer(decoder)
    ids = [WORDS.index(word) for word in ("b", "##c", "你", "c", "bb")]
    assert "".join(stream(tokenizer, ids, [1] * 5, True)) == tokenizer.decode(ids)


def test_token_text_shows_a_token_as_it_reads_in_the_middle(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer, mark in ((byte_level, "Ġ"), (sentencepiece, "▁")):
        spellings = {token_id: tokenizer.id_to_token(token_id) or "" for token_id in range(tokenizer.vocab_size)}
        words = {token_id: text for token_id, text in spellings.items() if text.startswith(mark) and text[1:].isascii()}
        assert words
        for token_id, text in words.items():
            assert token_text(tokenizer, token_id) == tokenizer.token_text(token_id) == " " + text[1:]


def test_cost_of_a_token_does_not_grow_with_the_text(byte_level: Tokenizer) -> None:
    calls = 0

    class Counting:
        decoder_state = byte_level.decoder_state
        special_token_ids = byte_level.special_token_ids

        def id_to_token(self, token_id: int) -> str | None:
            nonlocal calls
            calls += 1
            return byte_level.id_to_token(token_id)

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            raise AssertionError("the whole text must not be decoded again")

    detokenizer = IncrementalDetokenizer(Counting())  # type: ignore[arg-type]
    ids = byte_level.encode("The quick brown fox. " * 50)
    for token_id in ids:
        detokenizer.add([token_id])
    assert calls == len(ids)
