"""Small tokenizers of both families, trained on the spot, so that tests need no files."""

from __future__ import annotations

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sagellm_core.tokenizer import frame_tokens

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is LLM inference? It is running a trained model, token by token.",
    "The engine keeps the keys and values of every token in blocks of a cache.",
    "你好，世界！大模型推理就是逐个生成词元。",
    "Naïve café: 1234567890 — “quotes”, tabs\tand\nnew lines.",
] * 20


def byte_level_backend(vocab_size: int = 400) -> RustTokenizer:
    """GPT-2's kind: printable stand-ins for bytes, with three special tokens."""
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_backend() -> RustTokenizer:
    """Llama's kind: a mark for spaces, one space before the text, bytes for what the vocabulary lacks."""
    trained = RustTokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=40, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(t for t, i in learned if i > 2)]
    vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys([*tokens, "▁"]))}
    merges = [
        (t[:cut], t[cut:]) for t in tokens[259:] for cut in range(1, len(t)) if t[:cut] in vocab and t[cut:] in vocab
    ]
    backend = RustTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    frame_tokens(backend, bos="<s>", eos=None)
    return backend


def empty_backend() -> RustTokenizer:
    """One token and no rules: for tests that bring their own ids."""
    return RustTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
