"""Small random encoders of every supported family, with a tokenizer of their kind; as `model_zoo` for decoders."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from model_zoo import _draw_weights
from small_tokenizers import CORPUS

__all__ = ["ENCODERS", "VOCAB_SIZE", "build_encoder", "embedding_files"]

VOCAB_SIZE = 301

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 66,
}
# Name -> (configuration class, automatic class, what differs from the common fields).
_ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "AutoModel", {}),
    "bert-masked": ("BertConfig", "AutoModelForMaskedLM", {"hidden_act": "gelu_new", "type_vocab_size": 1}),
    "roberta": ("RobertaConfig", "AutoModel", {}),
    "xlm-roberta": ("XLMRobertaConfig", "AutoModel", {"type_vocab_size": 1}),
    "xlm-roberta-masked": ("XLMRobertaConfig", "AutoModelForMaskedLM", {}),
    "nomic_bert": ("NomicBertConfig", "AutoModel", {}),
}
ENCODERS: tuple[str, ...] = tuple(_ENCODERS)
"""Every supported family of encoders, alone and under the head that it was trained with."""


def build_encoder(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Write a checkpoint with a tokenizer to `folder`; returns the `transformers` model without its head."""
    import transformers

    config_class, auto_class, changes = _ENCODERS[name]
    config = getattr(importlib.import_module("transformers"), config_class)(**{**_COMMON, **changes})
    model = getattr(transformers, auto_class).from_config(config, attn_implementation="eager")
    _draw_weights(model, torch.Generator().manual_seed(0))
    model.to(dtype).eval().save_pretrained(folder)
    _word_piece().save(str(folder / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return getattr(model, model.base_model_prefix, model) if auto_class != "AutoModel" else model


def embedding_files(folder: Path, mode: str, *, normalize: bool = True, max_seq_length: int | None = None) -> None:
    """Write the files of sentence-transformers that say how vectors are made; `mode` as in `pooling_mode_<mode>`."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = dict.fromkeys(["pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens"], False)
    config = {"word_embedding_dimension": 64, **modes, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))


def _word_piece() -> RustTokenizer:
    """BERT's kind: lower case, pieces of words, [CLS] before and [SEP] behind a text."""
    backend = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE - 1, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return backend
