"""The tokenizer that a GGUF file carries in its metadata.

Holds `load_gguf_tokenizer` and `build_gguf_tokenizer`. GGUF names a kind (`tokenizer.ggml.model`) and lists tokens,
their types and scores or merges; how text is split before merging it only names (`tokenizer.ggml.pre`).
Built here, as `tokenizers` objects that encode like the model's original tokenizer:

- `gpt2`: byte-level BPE with merges (Qwen, Llama 3, Mistral Nemo, GPT-2, SmolLM, DeepSeek, ...);
- `llama`: SentencePiece BPE with byte fallback; merges follow from the scores (Llama 2, Mistral, Phi 3, Gemma, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagellm_core.gguf_metadata import read_gguf_metadata
from sagellm_core.tokenizer import FastBackend, Tokenizer, frame_tokens, named_chat_templates
from sagellm_protocol.errors import InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["build_gguf_tokenizer", "load_gguf_tokenizer"]

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE_MARK = "▁"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_LLAMA3 = _QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)

#: Regular expressions that cut a text, one after the other, by the name of the pre-tokenizer.
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt", "jais"), (_GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("chatglm-bpe", "glm4"), (_LLAMA3,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
}
#: Byte-level vocabularies whose original tokenizer puts a BOS before every text, and looks whole words up first.
_WITH_BOS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "tekken"})
#: Originals that normalise to composed characters.
_WITH_NFC = frozenset({"qwen2", "deepseek-r1-qwen", "megrez"})
#: Control tokens that end a turn or a text; files often name only one of a model's (the list is llama.cpp's).
_END_TOKENS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"),
        *("<eos>", "</s>", "<|eos|>", "<EOT>", "_<EOT>", "<|end_of_sentence|>", "<｜end▁of▁sentence｜>"),
    }
)


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a GGUF file. Raises `InvalidArgumentError`, `NotFoundError` or `UnsupportedError`."""
    return build_gguf_tokenizer(read_gguf_metadata(path), name=str(path))


def build_gguf_tokenizer(metadata: Mapping[str, Any], *, name: str = "GGUF file") -> Tokenizer:
    """The tokenizer that GGUF metadata describes; `name` stands in error messages."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise InvalidArgumentError(f"{name} holds no tokenizer (tokenizer.ggml.tokens); use a complete GGUF file")
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, name)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens)
    else:
        raise UnsupportedError(
            f"{name} has a tokenizer of kind {kind!r}, known are gpt2 and llama; use the original folder"
        )
    _add_special_tokens(backend, tokens, _token_types(metadata, tokens))
    special_tokens = _named_tokens(metadata, tokens)
    frame_tokens(
        backend,
        bos=special_tokens.get("bos_token") if _adds_bos(metadata) else None,
        eos=special_tokens.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token") else None,
    )
    return Tokenizer(
        FastBackend(backend),
        special_tokens=special_tokens,
        chat_templates=_chat_templates(metadata),
        extra_eos_token_ids=_end_token_ids(metadata, tokens),
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], name: str) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise UnsupportedError(
            f"{name} splits text by the rule {pre!r}, which is not known (known: {', '.join(sorted(_SPLITS))}); "
            "use the model's original folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    backend = Tokenizer(models.BPE(vocab=_vocab(tokens), merges=merges, ignore_merges=pre in _WITH_BOS))
    if pre in _WITH_NFC:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = _vocab(tokens)
    listed = metadata.get("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in listed] if listed else _merges_by_score(metadata, tokens, vocab)
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    to_mark = normalizers.Replace(" ", _SPACE_MARK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE_MARK), to_mark]) if has_prefix else to_mark
    steps = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return backend


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    """Token to id; of equal tokens (unused rows are often padded with one name) the first keeps it."""
    vocab: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        vocab.setdefault(token, token_id)
    return vocab


def _merges_by_score(
    metadata: Mapping[str, Any], tokens: Sequence[str], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every cut of a piece into two pieces, best piece first.

    Gemma's scores do not follow its merge order, but the order of its tokens does.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or str(metadata.get("general.architecture", "")).startswith("gemma"):
        scores = [-float(token_id) for token_id in range(len(tokens))]
    types = _token_types(metadata, tokens)
    ranked = []
    for token, token_id in vocab.items():
        if types[token_id] != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[token_id], token_id, vocab[left], vocab[right], left, right))
    ranked.sort(key=lambda entry: entry[:4])
    return [(left, right) for *_, left, right in ranked]


def _token_types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Sequence[int]:
    types: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    return types


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens become special tokens; user-defined ones are matched as a whole but stay text."""
    from tokenizers import AddedToken

    def of_kind(kind: int) -> list[str]:
        return [token for token, token_type in zip(tokens, types, strict=False) if token_type == kind and token]

    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_kind(_CONTROL)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in of_kind(_USER_DEFINED)])


def _named_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None and token_id < len(tokens)}


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _WITH_BOS
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template` is the default one, `tokenizer.chat_template.NAME` are others."""
    prefix = "tokenizer.chat_template."
    others = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    return named_chat_templates({**others, **named_chat_templates(metadata.get("tokenizer.chat_template"))})


def _end_token_ids(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """The ids of turn-ending tokens that the file names, and of control tokens known to end a text."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    types = _token_types(metadata, tokens)
    known = [i for i, token in enumerate(tokens) if types[i] == _CONTROL and token in _END_TOKENS]
    return [token_id for token_id in (*named, *known) if token_id is not None]
