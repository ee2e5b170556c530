"""A tokenizer written into a GGUF file encodes as the one it was taken from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.pre_tokenizers import ByteLevel

from sagellm_core.gguf_metadata import read_gguf_metadata
from sagellm_core.gguf_tokenizer import _SPLITS, build_gguf_tokenizer
from sagellm_core.tokenizer import FastBackend, Tokenizer, load_tokenizer
from sagellm_protocol.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from small_tokenizers import CORPUS, byte_level_backend, sentencepiece_backend

TEXTS = [
    *CORPUS[:5],
    "  two  spaces",
    " 👋🏽 é",
    "we're I'LL don't 12345",
    "a\n\n b\r\n",
    "<|im_start|>user\nhi<|im_end|>",
]


def write(path: Path, backend: RustTokenizer, kind: str, **entries: Any) -> Path:
    """A GGUF file without tensors that holds the backend's vocabulary; `entries` are further writer calls."""
    model = json.loads(backend.to_str())["model"]
    added = backend.get_added_tokens_decoder()
    tokens = [backend.id_to_token(token_id) or f"[PAD{token_id}]" for token_id in range(backend.get_vocab_size())]
    special = gguf.TokenType.CONTROL
    types = [special if i in added and added[i].special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    types = [gguf.TokenType.USER_DEFINED if i in added and not added[i].special else t for i, t in enumerate(types)]
    types = [gguf.TokenType.BYTE if t.startswith("<0x") else kind for t, kind in zip(tokens, types, strict=True)]
    writer = gguf.GGUFWriter(str(path), entries.pop("architecture", "llama"))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
    if kind == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        rank = {"".join(merge): position for position, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(rank.get(token, 1e6)) for token in tokens])
    for name, value in entries.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_byte_level(tmp_path: Path) -> None:
    backend = byte_level_backend()
    original = Tokenizer(FastBackend(backend))
    file = write(
        tmp_path / "model.gguf",
        backend,
        "gpt2",
        tokenizer_pre="gpt-2",
        eos_token_id=0,
        chat_template=[{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
    )
    tokenizer = load_tokenizer(file)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == original.encode(text)
        assert tokenizer.decode(ids, False) == text
    end = tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.eos_token_ids == (0, end), "a control token known to end a turn ends a text too"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=[{}]) == "t"


def test_sentencepiece(tmp_path: Path) -> None:
    backend = sentencepiece_backend()
    original = Tokenizer(FastBackend(backend))
    file = write(tmp_path / "model.gguf", backend, "llama", bos_token_id=1, eos_token_id=2, unk_token_id=0)
    tokenizer = load_tokenizer(file)
    for text in TEXTS:
        assert tokenizer.encode(text) == original.encode(text), "with the BOS that such files imply"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("name", [pytest.param("qwen2", marks=pytest.mark.slow), "gpt-2"])
def test_real_vocabularies(tmp_path: Path, shared: Path, name: str) -> None:
    folder = shared / {"qwen2": "tokenizers/qwen3", "gpt-2": "tokenizers/gpt2"}[name]
    original = load_tokenizer(folder)
    backend = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(write(tmp_path / "model.gguf", backend, "gpt2", tokenizer_pre=name))
    text = (shared / "texts/bilingual/tatoeba_cmn_eng.txt").read_text(encoding="utf-8")[:20_000]
    for sample in (*TEXTS, text, "<think>no</think><|im_end|>"):
        assert tokenizer.encode(sample) == original.encode(sample)


def test_real_sentencepiece_model(tmp_path: Path, shared: Path) -> None:
    folder = shared / "models/stories260K"
    original = load_tokenizer(folder)
    backend = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    file = write(tmp_path / "model.gguf", backend, "llama", bos_token_id=1, eos_token_id=2, unk_token_id=0)
    tokenizer = load_tokenizer(file)
    text = "Once upon a time, there was a little girl named Lily. She loved to play!\n"
    for sample in (*TEXTS, text):
        assert tokenizer.encode(sample) == original.encode(sample)
        assert tokenizer.decode(original.encode(sample)) == original.decode(original.encode(sample))


def vocabulary(**entries: Any) -> Mapping[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{name}": value for name, value in entries.items()},
    }


def test_scores_decide_which_pieces_merge_first() -> None:
    tokens = build_gguf_tokenizer(vocabulary())
    assert tokens.encode("ab", add_special_tokens=False) == [8]
    # Without the whole word the better of two ways to cut it wins.
    shorter = dict(vocabulary(), **{"tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 5]})
    assert build_gguf_tokenizer(shorter).encode("ab", add_special_tokens=False) == [3, 7]


@pytest.mark.parametrize(
    ("entries", "ids"),
    [
        ({}, [1, 8]),
        ({"add_bos_token": False}, [8]),
        ({"add_eos_token": True}, [1, 8, 2]),
        ({"add_space_prefix": False}, [1, 7]),
    ],
)
def test_flags(entries: dict[str, Any], ids: list[int]) -> None:
    tokenizer = build_gguf_tokenizer(vocabulary(**entries))
    assert tokenizer.encode("ab") == ids
    assert tokenizer.decode(ids) == "ab"


def test_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="kind 'rwkv', known are gpt2 and llama"):
        build_gguf_tokenizer(vocabulary(model="rwkv"))
    with pytest.raises(UnsupportedError, match=r"rule 'klingon', which is not known \(known: .*qwen2"):
        build_gguf_tokenizer(vocabulary(model="gpt2", pre="klingon"))
    with pytest.raises(InvalidArgumentError, match="holds no tokenizer"):
        build_gguf_tokenizer({})


def test_metadata_equals_what_the_gguf_package_reads(tmp_path: Path) -> None:
    file = write(
        tmp_path / "model.gguf",
        byte_level_backend(),
        "gpt2",
        name="ünï",
        block_count=3,
        rope_freq_base=1.5,
        add_bos_token=True,
        feed_forward_length=[1, 2, 3],
    )
    reader = gguf.GGUFReader(str(file))
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert read_gguf_metadata(file) == expected


def test_broken_files_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", byte_level_backend(), "gpt2")
    data = file.read_bytes()
    for broken, match in (
        (data[:-200], "no readable GGUF header"),
        (data[:10], "no readable GGUF header"),
        (b"", "is empty"),
        (b"PK\x03\x04" + data[4:], "not a GGUF file"),
        (data[:4] + b"\x00\x00\x00\x03" + data[8:], "version"),
    ):
        file.write_bytes(broken)
        with pytest.raises(InvalidArgumentError, match=match):
            read_gguf_metadata(file)
    with pytest.raises(NotFoundError, match="no file"):
        read_gguf_metadata(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("pre", sorted(_SPLITS))
def test_every_known_rule_keeps_the_text(pre: str) -> None:
    tokens = [*ByteLevel.alphabet(), "<s>"]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens}
    tokenizer = build_gguf_tokenizer(metadata)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
