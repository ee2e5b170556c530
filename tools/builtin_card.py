"""The text of the built-in model's card, filled from a checkpoint and its measurements."""

from __future__ import annotations

from typing import Any

from builtin_llama import LlamaConfig

__all__ = ["model_card"]

CARD = """\
# Model card: the built-in model of sageLLM

A tiny chat model in the Llama architecture, shipped with sageLLM under the id `builtin`, so that every command works
at once without a download. It answers simple questions about LLM serving and about sageLLM in English, a few in
Chinese, says honestly when it does not know, and continues simple stories. It was trained from scratch on one CPU core
by `tools/train_builtin_model.py`; nothing was distilled from or initialised with another model.

## Shape

| | |
| --- | --- |
| parameters | {parameters:,} |
| layers, width, feed-forward | {config.num_hidden_layers}, {config.hidden_size}, {config.intermediate_size} (SwiGLU) |
| attention | {config.num_attention_heads} heads, {config.num_key_value_heads} key-value heads, RoPE |
| vocabulary | {config.vocab_size:,}, byte-level BPE, trained on the same texts |
| context | {config.max_position_embeddings:,} tokens |
| stored as | bfloat16 safetensors, tied embeddings |
| chat format | ChatML (`<|im_start|>role` … `<|im_end|>`), system message optional, greedy decoding |

## Training

| | |
| --- | --- |
| seed | {settings[seed]} |
| steps, tokens seen | {progress[step]:,}, {progress[tokens]:,} |
| time | {minutes:.0f} minutes on one core (AVX2, float32) |
| rows a step | {settings[rows]} × {settings[length]} tokens, every tenth step {config.max_position_embeddings} a row |
| optimiser | Muon (rate {settings[muon_lr]}) for matrices, AdamW (rate {settings[adam_lr]}) for embeddings and norms |
| schedule | {settings[warmup_steps]} warm-up steps, constant, then linear to zero in the last {decay:.0%} |
| weights shipped | running average, factor {settings[average]} |

Documents are packed in rows and do not see each other. Of conversations only the answers are learned. Stories are
about 70 percent of the tokens at first and 60 percent at the end, in favour of questions and answers. Questions are
varied on the fly (case, punctuation, typing errors, words around them), put together to
conversations of several turns, with and without a system message. The schedule follows the wall clock, so a second
run with the same seed sees the same texts in the same order but need not end with the same weights.{note}

| step | tokens | minutes | training loss |
| --- | --- | --- | --- |
{curve}

## Measured

| | |
| --- | --- |
| perplexity by token on {stories} TinyStories validation stories | {results[perplexity]:.2f} |
| bits by character on the same | {results[bits_per_character]:.3f} |
| held-out questions answered word for word | {results[accuracy]:.1%} of {results[held_out_questions]} |
| … without the repetition penalty | {results[accuracy_without_penalty]:.1%} |
| … English, Chinese, out of scope | {english:.1%}, {chinese:.1%}, {refusal:.1%} |

Held-out questions are other wordings of known questions (and unknown questions out of scope) that were never trained
on, answered greedily by the exported weights with the shipped repetition penalty of {penalty}, which keeps stories
from going in circles; an answer counts only if it is the expected one in every character.

### Samples

{samples}

## Sources

| source | use | licence |
| --- | --- | --- |
| questions and answers in `tools/builtin_data`, written for this project | chat | Apache-2.0 |
| TinyStories samples (Ronen Eldan and Yuanzhi Li) | stories, lost capitals restored | CDLA-Sharing-1.0 |
| TinyTalks v1, Copyright (c) 2025 TinyTorch Contributors | everyday questions, selected | [CC BY 4.0] |
| ChatterBot corpus (Gunther Cox and contributors) | questions only, to be declined | BSD-3-Clause |

The TinyStories validation file was only used to measure. Share-alike sources were left out.

[CC BY 4.0]: https://creativecommons.org/licenses/by/4.0/

## Limits

It has about five million parameters and knows little beyond the facts it was trained on. Questions that are
worded in an unusual way may get the answer to another question, and questions out of scope are sometimes answered
wrongly instead of being declined. It cannot calculate, translate or write code. Stories are simple and lose
their thread. For real work choose a larger model with `--model`.

## Licence

The weights, the tokenizer and this project's data are under the Apache License 2.0. The sources keep the licences
named above.
"""


def _curve(losses: list[dict[str, float]], rows: int = 24) -> str:
    """About `rows` evenly spread rows of the loss curve, the last one included."""
    every = max(1, len(losses) // rows)
    chosen = losses[::every]
    if losses and chosen[-1] is not losses[-1]:
        chosen.append(losses[-1])
    return "\n".join(
        f"| {row['step']:.0f} | {row['tokens']:,.0f} | {row['minutes']:.0f} | {row['loss']:.3f} |" for row in chosen
    )


def _samples(samples: list[list[str]]) -> str:
    """Questions and answers as a list of quotations."""
    return "\n\n".join(f"**{question}**\n\n> " + answer.replace("\n", "\n> ") for question, answer in samples)


def model_card(config: LlamaConfig, state: dict[str, Any], results: dict[str, Any], penalty: float, note: str) -> str:
    """The card of the model in `state`, with the `results` measured on its export and a note on the run."""
    return CARD.format(
        config=config,
        note=" " + note if note else "",
        parameters=sum(tensor.numel() for tensor in state["model"].values()),
        settings=state["settings"],
        progress=state["progress"],
        minutes=state["progress"]["seconds"] / 60,
        decay=state["settings"]["decay_share"],
        curve=_curve(state["losses"]),
        results=results,
        penalty=penalty,
        stories=int(results["stories"]),
        english=results["accuracy_english"],
        chinese=results["accuracy_chinese"],
        refusal=results["accuracy_refusal"],
        samples=_samples(results["samples"]),
    )
