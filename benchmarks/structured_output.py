"""What structured output costs a step, without any model: `python benchmarks/structured_output.py [MODEL_FOLDER]`.

Writes a text under a grammar, token by token, and prints the mean and the largest time of each part. To take a token in
is to check it, to move the completion along and to fill the next mask; `near the end` has just enough tokens for the
text, so that some need a longer search; `unsteered` leaves out the completion. `docs/structured-output.md` quotes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from sagellm_core.models import resolve_model
from sagellm_core.sampling.penalties import apply_mask
from sagellm_core.structured.compiler import CompiledGrammar, CompileLimits
from sagellm_core.structured.vocabulary import Vocabulary
from sagellm_core.tokenizer import load_tokenizer
from sagellm_protocol import StructuredOutput

ADDRESS = {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "integer"}}}
ADDRESS |= {"required": ["street", "zip"], "additionalProperties": False}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "kind": {"enum": ["friend", "colleague", "stranger"]},
        "addresses": {"type": "array", "items": ADDRESS},
    },
    "required": ["name", "age", "tags", "kind", "addresses"],
    "additionalProperties": False,
}
DOCUMENT = {
    "name": "Ada Lovelace, Countess of Lovelace",
    "age": 36,
    "tags": ["mathematics", "poetry", "engines"],
    "kind": "colleague",
    "addresses": [{"street": "12 St James's Square", "zip": 10115}, {"street": "Ockham Park", "zip": 22111}],
}
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "json_schema": ({"json_schema": PERSON}, json.dumps(DOCUMENT)),
    "json_object": ({"json_object": True}, json.dumps(DOCUMENT)),
    "regex": ({"regex": "([A-Z][a-z]+ ){3,40}[0-9]{4}"}, "Ada Lovelace Wrote Notes On Engines In Eighteen 1843"),
}


def timed(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    started_at = time.perf_counter()
    call()
    return (time.perf_counter() - started_at) * 1e6


def line(name: str, values: Sequence[float]) -> None:
    """Print mean and maximum."""
    print(f"  {name:<34} {statistics.fmean(values):9.1f} us (largest {max(values):.0f})")


def bench(vocabulary: Vocabulary, tokens: list[int], form: dict[str, Any]) -> None:
    """Print what one form costs, writing `tokens`."""
    wanted = StructuredOutput.model_validate(form)
    compiled = [timed(lambda: CompiledGrammar(vocabulary, wanted, CompileLimits())) for _ in range(5)]
    grammar = CompiledGrammar(vocabulary, wanted, CompileLimits())
    line("compiling, once", compiled)
    line("starting a sequence", [timed(lambda: grammar.start(4096)) for _ in range(20)])
    cases = (("far from the end", 4096, True), ("near the end", len(tokens), True), ("unsteered", 4096, False))
    for name, budget, is_steered in cases:
        taken = []
        for round_ in range(6):
            matcher = grammar.start(budget)
            if not is_steered:
                matcher._symbols = matcher._completion = None
            for count, token_id in enumerate(tokens, start=1):
                value = timed(partial(matcher.accept, token_id, budget - count))
                if round_ > 0:
                    taken.append(value)
        line(f"taking a token, {name}", taken)
    logits = torch.randn(vocabulary.tokens.vocab_size)
    for name, token_ids in (
        ("half of the tokens", range(0, len(logits), 2)),
        ("all but a few", range(99, len(logits))),
        ("one token", [7]),
    ):
        bits = np.zeros(-(-len(logits) // 32) * 32, dtype=np.uint8)
        bits[list(token_ids)] = 1
        mask = np.packbits(bits, bitorder="little").view(np.int32)
        line(f"applying a mask of {name}", [timed(partial(apply_mask, logits, mask)) for _ in range(50)])


def main() -> None:
    """Run all forms with the tokenizer of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin", help="a model folder, or `builtin`")
    tokenizer = load_tokenizer(resolve_model(parser.parse_args().model))
    started_at = time.perf_counter()
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    print(f"{tokenizer.vocab_size} tokens, vocabulary built in {time.perf_counter() - started_at:.2f} s")
    for name, (form, text) in FORMS.items():
        print(name)
        bench(vocabulary, tokenizer.encode(text, add_special_tokens=False), form)


if __name__ == "__main__":
    main()
