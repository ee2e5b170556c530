"""Loading model folders, framing with special tokens, and equality with transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sagellm_core.tokenizer import Tokenizer, load_tokenizer
from sagellm_protocol.errors import InvalidArgumentError, NotFoundError, UnavailableError
from small_tokenizers import byte_level_backend, sentencepiece_backend

TEXTS = [
    "Hello, world!",
    "  two  spaces",
    "你好 👋🏽 é",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>a</s>",
    "tab\tnew\nline",
]


def save(folder: Path, backend: Any, config: Mapping[str, Any] | None = None, **files: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["tokenizers/qwen3", "tokenizers/gpt2", "models/stories260K", "models/llama2xs"])
def test_equals_transformers(shared: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(shared / name)
    config = json.loads((shared / name / "tokenizer_config.json").read_text())
    named = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)}
    framing = {key: config[key] for key in ("add_bos_token", "add_eos_token") if key in config}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(shared / name / "tokenizer.json"), **named, **framing)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("add_eos", [True, False, None])
def test_framing_follows_the_configuration_else_the_post_processor(
    tmp_path: Path, add_bos: bool | None, add_eos: bool | None
) -> None:
    flags = {name: flag for name, flag in (("add_bos_token", add_bos), ("add_eos_token", add_eos)) if flag is not None}
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, **flags}
    tokenizer = load_tokenizer(save(tmp_path, sentencepiece_backend(), config))
    plain = tokenizer.encode("hi", add_special_tokens=False)
    has_bos = bool(add_bos) if flags else True  # the file's own post-processor adds a BOS
    assert tokenizer.encode("hi") == [1] * has_bos + plain + [2] * bool(add_eos)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (1, 2, (2,))


def test_special_tokens_map_fills_what_the_configuration_leaves_out(tmp_path: Path) -> None:
    folder = save(
        tmp_path,
        sentencepiece_backend(),
        {"eos_token": "</s>"},
        special_tokens_map__json={"bos_token": {"content": "<s>"}, "eos_token": "<s>"},
    )
    assert load_tokenizer(folder).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_special_tokens_in_a_text_are_parsed_unless_switched_off(tmp_path: Path) -> None:
    backend = byte_level_backend()
    special = backend.token_to_id("<|im_end|>")
    parsed = load_tokenizer(save(tmp_path, backend, {}))
    assert parsed.encode("a<|im_end|>")[-1] == special
    split = load_tokenizer(save(tmp_path, backend, {"split_special_tokens": True}))
    assert special not in split.encode("a<|im_end|>")
    assert split.decode(split.encode("a<|im_end|>")) == "a<|im_end|>"


def test_tokens_of_the_configuration_become_tokens(tmp_path: Path) -> None:
    backend = byte_level_backend()
    size = backend.get_vocab_size()
    config = {
        "eos_token": "the",  # in the vocabulary, but not special there
        "pad_token": "<nowhere>",  # would get an id that the model has no row for
        "added_tokens_decoder": {str(size): {"content": "<|tool|>", "special": True}},
        "additional_special_tokens": ["<|im_start|>"],
    }
    tokenizer = load_tokenizer(save(tmp_path, backend, config))
    assert tokenizer.token_to_id("<|tool|>") == size
    assert {size, backend.token_to_id("<|im_start|>")} <= tokenizer.special_token_ids
    assert tokenizer.token_to_id("<nowhere>") is None
    assert tokenizer.vocab_size == size + 1
    if backend.token_to_id("the") is not None:
        assert tokenizer.eos_token_id in tokenizer.special_token_ids


def test_padding_and_truncation_of_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(save(tmp_path, backend))
    assert len(tokenizer.encode("The quick brown fox jumps")) > 4
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize(
    ("config", "files", "names"),
    [
        ({}, {}, []),
        ({"chat_template": "one"}, {}, ["default"]),
        ({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}, {}, None),
        ({"chat_template": "old"}, {"chat_template__jinja": "new"}, ["default"]),
        ({}, {"chat_template__json": {"chat_template": "json"}}, ["default"]),
    ],
)
def test_where_chat_templates_are_found(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], names: list[str] | None
) -> None:
    tokenizer = load_tokenizer(save(tmp_path, byte_level_backend(), config, **files))
    assert tokenizer.has_chat_template == (names != [])
    message = [{"role": "user", "content": "hi"}]
    if files:
        assert tokenizer.apply_chat_template(message) in ("new", "json")
    if names is None:
        assert tokenizer.apply_chat_template(message) == "d"
        assert tokenizer.apply_chat_template(message, tools=[{"type": "function"}]) == "t"
        assert tokenizer.apply_chat_template(message, chat_template="tool_use") == "t"
        with pytest.raises(InvalidArgumentError, match=r"no chat template named 'rag'.*default, tool_use"):
            tokenizer.apply_chat_template(message, chat_template="rag")


def test_chat_adds_no_bos_to_a_template_and_one_to_plain_text(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert byte_level.decode(byte_level.encode_chat(messages), False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sentencepiece.decode(sentencepiece.encode_chat(messages), False) == "<s> User: hi\nAssistant:"


def test_encode_refuses_what_is_no_text(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidArgumentError, match=r"lone surrogate at character 1"):
        byte_level.encode("a\ud800")
    with pytest.raises(InvalidArgumentError, match="must be a string, got bytes"):
        byte_level.encode(b"a")  # type: ignore[arg-type]


def test_threads_share_a_tokenizer(byte_level: Tokenizer) -> None:
    texts = [f"The quick brown fox {index} 你好" * 5 for index in range(40)]
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(byte_level.encode, texts))
        assert list(pool.map(byte_level.decode, ids)) == texts


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ({"tokenizer.json": "{"}, InvalidArgumentError, "not a readable tokenizer.json"),
        ({"tokenizer_config.json": "[]"}, InvalidArgumentError, "must hold a JSON object"),
        ({"tokenizer_config.json": "{"}, InvalidArgumentError, "not valid JSON"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, files: dict[str, str], error: type[Exception], match: str) -> None:
    save(tmp_path, byte_level_backend())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=match):
        load_tokenizer(tmp_path)


def test_missing_folder_and_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no model folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_may_be_named_itself(tmp_path: Path) -> None:
    save(tmp_path, byte_level_backend(), {"eos_token": "<|im_end|>"})
    assert load_tokenizer(tmp_path / "tokenizer.json").special_tokens == {"eos_token": "<|im_end|>"}


def test_without_tokenizer_json_transformers_helps(tmp_path: Path, shared: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers/gpt2" / name, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    converted, original = load_tokenizer(tmp_path), load_tokenizer(shared / "tokenizers/gpt2")
    for text in TEXTS:
        assert converted.encode(text) == original.encode(text)
    assert converted.eos_token_id == original.eos_token_id
    assert not converted.has_chat_template


def test_without_transformers_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match=r"pip install 'isagellm\[hf\]'"):
        load_tokenizer(tmp_path)


def test_what_transformers_cannot_read_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match="transformers cannot read the tokenizer in"):
        load_tokenizer(tmp_path)


def test_a_python_tokenizer_of_transformers_streams_too() -> None:
    from sagellm_core.detokenizer import IncrementalDetokenizer
    from sagellm_core.hf_tokenizer import SlowBackend

    class Bytes:
        """As transformers' ByT5: one token a byte, none special."""

        all_special_ids = (0,)

        def __len__(self) -> int:
            return 257

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [byte + 1 for byte in text.encode()] + [0] * add_special_tokens

        def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            return bytes(token_id - 1 for token_id in ids if token_id).decode("utf-8", "replace")

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return str(token_id)

        def convert_tokens_to_ids(self, token: str) -> int:
            return int(token)

    tokenizer = Tokenizer(SlowBackend(Bytes()), special_tokens={"eos_token": "0"})
    ids = tokenizer.encode("héllo 你好")
    detokenizer = IncrementalDetokenizer(tokenizer)
    chunks = [detokenizer.add([token_id]) for token_id in ids]
    assert "".join(chunks) + detokenizer.flush() == "héllo 你好"
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert tokenizer.token_text(ids[0]) == "h"


def test_the_main_path_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, sagellm_core.tokenizer, sagellm_core.input_processor, sagellm_core.output_processor;"
        "assert not {'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
