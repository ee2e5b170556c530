"""Workloads: how many requests of which lengths, run how many at a time. By name, or from a YAML file.

::

    name: mine
    scenarios:
      - {name: short, num_requests: 5, prompt_tokens: 128, output_tokens: 128}
      - {name: stress, num_requests: 10, prompt_tokens: 256, output_tokens: 256, concurrency: 10}

Lengths hold exactly: prompts are token ids of the model's own tokenizer, cut to length, and the end-of-sequence token
is ignored. The prompts of a workload differ within their first tokens, so that no prefix cache helps; the same workload
and tokenizer give the same prompts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import Field

from sagellm_core.demo import Scenario
from sagellm_protocol import EdgeModel, InvalidArgumentError, NotFoundError, SamplingParams, parse

if TYPE_CHECKING:
    from sagellm_core.tokenizer import Tokenizer

_TEXT = """
A language model reads a text as a row of tokens and says which token is likely to come next. To write an answer it
does so again and again, and every new token joins the row. What the model computed for the earlier tokens is kept, so
that only the newest one has to go through its layers. Many readers can be served at once: their rows differ, but the
weights are the same, and a machine that has read the weights for one row may use them for all. The morning was quiet
when the engineer opened the window. Down in the yard a boy was counting sparrows, and the old clock over the gate had
stopped at noon, as it had done every day since winter. She wrote three numbers on the board: how long the first word
takes, how long each word after it, and how many words the whole house hears in a second.
"""


_NUM_OWN_TOKENS = 4


class ScenarioSpec(EdgeModel):
    """Equal requests: all lengths in tokens."""

    name: str = Field(min_length=1)
    num_requests: int = Field(ge=1, le=100_000)
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    concurrency: int = Field(default=1, ge=1, description="requests at the same time; 1 is one after the other")


class Workload(EdgeModel):
    """Scenarios that run one after the other."""

    name: str = Field(min_length=1)
    scenarios: list[ScenarioSpec] = Field(min_length=1)


_SHORT = ScenarioSpec(name="short", num_requests=5, prompt_tokens=128, output_tokens=128)
_LONG = ScenarioSpec(name="long", num_requests=3, prompt_tokens=200, output_tokens=200)
_STRESS = ScenarioSpec(name="stress", num_requests=10, prompt_tokens=256, output_tokens=256, concurrency=10)

WORKLOADS = {
    "year1": Workload(name="year1", scenarios=[_SHORT, _LONG, _STRESS]),
    "short": Workload(name="short", scenarios=[_SHORT]),
    "long": Workload(name="long", scenarios=[_LONG]),
    "stress": Workload(name="stress", scenarios=[_STRESS]),
}


def load_workload(name_or_file: str) -> Workload:
    """The workload of that name, or that of a YAML file.

    Raises `NotFoundError` where neither exists, `InvalidArgumentError` for a file with something else in it.
    """
    if name_or_file in WORKLOADS:
        return WORKLOADS[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise NotFoundError(
            f"{name_or_file!r} is neither a workload ({', '.join(WORKLOADS)}) nor a YAML file", field="workload"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    return parse(Workload, data, what=f"workload {path}")


def build_scenario(spec: ScenarioSpec, tokenizer: Tokenizer) -> Scenario:
    """The scenario with its prompts, for the model that `tokenizer` belongs to."""
    return Scenario(
        name=spec.name,
        prompts=_build_prompts(spec, tokenizer),
        sampling=SamplingParams(max_tokens=spec.output_tokens, temperature=0.0, ignore_eos=True),
        concurrency=spec.concurrency,
    )


def _build_prompts(spec: ScenarioSpec, tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts that begin with a few tokens of their own and go on at different places of the text, a circle."""
    text = tokenizer.encode(" ".join(_TEXT.split()), add_special_tokens=False)
    num_copies = -(-spec.prompt_tokens // len(text)) + 1
    circle = text * num_copies
    prompts = []
    for number in range(spec.num_requests):
        mark = random.Random(f"{spec.name} {number}").choices(text, k=_NUM_OWN_TOKENS)
        start = number * 7 % len(text)
        prompts.append([*mark, *circle[start : start + spec.prompt_tokens]][: spec.prompt_tokens])
    return prompts
