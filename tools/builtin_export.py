"""The built-in model as it is shipped: Hugging Face files, measurements of those files, and the model card."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from builtin_card import model_card
from builtin_corpus import chat_prompt
from builtin_llama import LlamaConfig
from builtin_questions import load_facts

__all__ = ["evaluate", "export_model", "generate", "load_exported", "validation_loss", "write_model_card"]

DTYPE = torch.bfloat16
END_OF_TEXT, END_OF_TURN = 0, 2
REPETITION_PENALTY = 1.05
"""Keeps greedy stories from going in circles; answers to questions do not suffer from it."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
SAMPLES = (
    "What is LLM inference?", "What is the KV cache?", "How do I install sageLLM?", "Who are you?", "Hello!",
    "What is continuous batching?", "How can I use another model?", "What is prefill versus decode?",
    "Are you ChatGPT?", "什么是大模型推理？", "你是谁？", "Who was Napoleon?", "Tell me a story about a dog.",
)  # fmt: skip
STORY_START = "Once upon a time, there was a little girl named Lily."


def model_config(config: LlamaConfig) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "torch_dtype": str(DTYPE).removeprefix("torch."),
    }


def tokenizer_config(config: LlamaConfig) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    special = {"0": "<|endoftext|>", "1": "<|im_start|>", "2": "<|im_end|>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "added_tokens_decoder": {number: {"content": text, **flags} for number, text in special.items()},
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def generation_config() -> dict[str, Any]:
    """The contents of generation_config.json."""
    return {
        "do_sample": False,
        "repetition_penalty": REPETITION_PENALTY,
        "eos_token_id": [END_OF_TURN, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
    }


def export_model(config: LlamaConfig, weights: dict[str, Tensor], tokenizer: Path, out: Path) -> None:
    """Write the model to `out`; every file appears whole, by a rename."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(DTYPE).contiguous() for name, tensor in weights.items()}
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as name:
        folder = Path(name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        for file, content in (
            ("config.json", model_config(config)),
            ("tokenizer_config.json", tokenizer_config(config)),
            ("generation_config.json", generation_config()),
        ):
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            path.replace(out / path.name)


def load_exported(folder: Path) -> tuple[Any, Any]:
    """Model (in float32) and tokenizer of a folder, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = 96, penalty: float = REPETITION_PENALTY
) -> list[str]:
    """Greedy continuations of `prompts`, computed together."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "repetition_penalty": penalty}
    output = model.generate(**inputs, **options)
    texts: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def evaluate(model_dir: Path) -> dict[str, Any]:
    """Answers to all questions that were held out of training; correct is the whole answer, word for word."""
    model, tokenizer = load_exported(model_dir)
    cases = [(fact, question) for fact in load_facts() for question in fact.held_out]
    cases.sort(key=lambda case: len(case[1]))
    answers: list[str] = []
    plain: list[str] = []
    for start in range(0, len(cases), 32):
        prompts = [chat_prompt([], question) for _, question in cases[start : start + 32]]
        answers += generate(model, tokenizer, prompts)
        plain += generate(model, tokenizer, prompts, penalty=1.0)
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    wrong: list[dict[str, str]] = []
    for (fact, question), answer in zip(cases, answers, strict=True):
        right = answer == fact.answer
        kind = "refusal" if fact.id == "refusal" else "chinese" if fact.id.startswith("zh-") else "english"
        groups[kind].append(right)
        if not right:
            wrong.append({"id": fact.id, "question": question, "answer": answer})
    results: dict[str, Any] = {f"accuracy_{kind}": sum(rights) / len(rights) for kind, rights in groups.items()}
    results["held_out_questions"] = len(cases)
    results["accuracy"] = 1 - len(wrong) / len(cases)
    results["accuracy_without_penalty"] = sum(
        answer == fact.answer for (fact, _), answer in zip(cases, plain, strict=True)
    ) / len(cases)
    results["wrong"] = wrong
    asked = list(SAMPLES)
    replies = [generate(model, tokenizer, [chat_prompt([], question)], 300)[0] for question in asked]
    replies.append(generate(model, tokenizer, [STORY_START], 300)[0])
    results["samples"] = [list(pair) for pair in zip([*asked, STORY_START], replies, strict=True)]
    return results


@torch.inference_mode()
def validation_loss(model_dir: Path, stories: list[str]) -> dict[str, float]:
    """Perplexity by token, and bits by character, of stories that were not trained on."""
    model, tokenizer = load_exported(model_dir)
    loss, count, characters = 0.0, 0, 0
    for story in stories:
        ids = tokenizer(story, return_tensors="pt", add_special_tokens=False)["input_ids"]
        ids = torch.cat((ids, torch.tensor([[END_OF_TEXT]])), dim=1)
        logits = model(ids[:, :-1]).logits[0]
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
        characters += len(story)
    bits = loss / math.log(2) / characters
    return {"perplexity": math.exp(loss / count), "bits_per_character": bits, "stories": float(len(stories))}


def write_model_card(config: LlamaConfig, state: dict[str, Any], results: dict[str, Any], note: str, out: Path) -> None:
    """MODEL_CARD.md beside the weights."""
    temporary = out / ".MODEL_CARD.md"
    temporary.write_text(model_card(config, state, results, REPETITION_PENALTY, note), encoding="utf-8")
    temporary.replace(out / "MODEL_CARD.md")
