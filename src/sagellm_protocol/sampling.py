"""How the next token is chosen: strategies, presets and the parameters of a request.

Precedence is decided by what was *given*: ``request.merged_over(engine).merged_over(model)`` takes each field from the
first that gave it explicitly, else the default written here. Send parameters with ``model_dump(exclude_unset=True)`` to
keep that knowledge on the wire (a :class:`~sagellm_protocol.request.Request` does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.fields import (
    AdditivePenalty,
    LengthPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    MinTokens,
    NumBeams,
    NumLogprobs,
    NumOutputs,
    PenaltyAlpha,
    RepetitionPenalty,
    Seed,
    StopStrings,
    StopTokenIds,
    Temperature,
    TopK,
    TopP,
)
from sagellm_protocol.model import EdgeModel, ProtocolEnum

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_NUM_BEAMS = 4
DEFAULT_CONTRASTIVE_TOP_K = 4


class DecodingStrategy(ProtocolEnum):
    """Which algorithm chooses the tokens."""

    GREEDY = "greedy"
    SAMPLING = "sampling"
    BEAM_SEARCH = "beam_search"
    CONTRASTIVE = "contrastive"


class SamplingPreset(ProtocolEnum):
    """Named sets of parameters; see :meth:`SamplingParams.from_preset`."""

    DETERMINISTIC = "deterministic"  # greedy: the same answer every time
    PRECISE = "precise"  # close to the most probable answer
    BALANCED = "balanced"  # everyday chat
    CREATIVE = "creative"  # varied; avoids what it already said


class SamplingParams(EdgeModel):
    """The decoding parameters of a request, validated and consistent.

    ``strategy`` not given is derived: more than one beam means BEAM_SEARCH, a temperature above 0 SAMPLING, else
    GREEDY. What a strategy needs and wasn't given is filled in: SAMPLING ``temperature=1``, BEAM_SEARCH
    ``num_beams=4`` (``n`` if that is more), CONTRASTIVE ``top_k=4``.

    An explicit GREEDY ignores temperature, top_p, top_k and min_p; an explicit SAMPLING with an explicit temperature
    of 0 takes the most probable token. Beam and contrastive search are deterministic and refuse a temperature above 0;
    beam search returns ``n <= num_beams`` outputs, contrastive search one.

    ``stop`` and ``stop_token_ids`` take None, one or several and are tuples afterwards; ``top_k=-1`` is read as 0.

    Raises:
        InvalidArgumentError: naming the field and the remedy.
    """

    strategy: DecodingStrategy = Field(
        default=DecodingStrategy.GREEDY, description="Derived from the other fields if left out."
    )
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: AdditivePenalty = 0.0
    frequency_penalty: AdditivePenalty = 0.0
    length_penalty: LengthPenalty = 1.0
    num_beams: NumBeams = 1
    early_stopping: bool | Literal["never"] = Field(
        default=False,
        description="Beam search: stop at num_beams finished beams (true), when no better is likely (false), or "
        'only when no better is possible ("never").',
    )
    penalty_alpha: PenaltyAlpha = 0.6
    max_tokens: MaxTokens = 128
    min_tokens: MinTokens = 0
    stop: StopStrings = ()
    stop_token_ids: StopTokenIds = ()
    include_stop_str_in_output: bool = Field(default=False, description="Keep the stop string at the end of the text.")
    ignore_eos: bool = Field(default=False, description="Go on after the model's end-of-sequence token.")
    seed: Seed | None = None
    n: NumOutputs = 1
    logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    logit_bias: LogitBias | None = None
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")

    @model_validator(mode="after")
    def _settle(self) -> Self:
        # Written past the frozen guard on purpose: a derived value must not count as given.
        self.__dict__.update(self._derived())
        self._check_strategy()
        if self.min_tokens > self.max_tokens:
            raise InvalidArgumentError(
                f"min_tokens must be <= max_tokens ({self.max_tokens}), got {self.min_tokens}; raise max_tokens",
                field="min_tokens",
            )
        return self

    def _derived(self) -> dict[str, Any]:
        """Return the fields that follow from the given ones."""
        given = self.model_fields_set
        strategy = self.strategy
        if "strategy" not in given:
            strategy = _implied_strategy(self.temperature, self.num_beams) or DecodingStrategy.GREEDY
        derived: dict[str, Any] = {"strategy": strategy}
        if strategy is DecodingStrategy.SAMPLING and "temperature" not in given:
            derived["temperature"] = 1.0
        if strategy is DecodingStrategy.BEAM_SEARCH and "num_beams" not in given:
            derived["num_beams"] = max(DEFAULT_NUM_BEAMS, self.n)
        if strategy is DecodingStrategy.CONTRASTIVE and "top_k" not in given:
            derived["top_k"] = DEFAULT_CONTRASTIVE_TOP_K
        return derived

    def _check_strategy(self) -> None:
        strategy, problem = self.strategy, None
        is_beam, is_contrastive = strategy is DecodingStrategy.BEAM_SEARCH, strategy is DecodingStrategy.CONTRASTIVE
        if (is_beam or is_contrastive) and self.temperature > 0:
            problem = (
                f"temperature must be 0 with strategy {strategy} (it is deterministic), got {self.temperature:g}; "
                "leave temperature out or use strategy sampling"
            )
        elif not is_beam and self.num_beams > 1:
            problem = f"num_beams must be 1 with strategy {strategy}, got {self.num_beams}; use strategy beam_search"
        elif is_beam and self.n > self.num_beams:
            problem = f"n must be <= num_beams ({self.num_beams}) with beam search, got {self.n}; raise num_beams"
        elif is_contrastive and self.n > 1:
            problem = f"n must be 1 with contrastive search, got {self.n}; use strategy sampling for several"
        elif is_contrastive and self.top_k < 1:
            problem = "top_k must be >= 1 with contrastive search (its number of candidates), got 0; use 4"
        if problem is not None:
            raise InvalidArgumentError(problem, field=problem.split(" ", 1)[0])

    @classmethod
    def from_preset(cls, preset: SamplingPreset | str, **overrides: Any) -> SamplingParams:
        """Return the parameters of ``preset`` with ``overrides`` over them (as :meth:`merged_over` does it).

        Raises:
            InvalidArgumentError: for an unknown preset or a wrong override.
        """
        try:
            values = _PRESETS[SamplingPreset(preset)]
        except ValueError:
            known = ", ".join(member.value for member in SamplingPreset)
            raise InvalidArgumentError(f"unknown preset {preset!r}; use one of {known}", field="preset") from None
        return cls(**overrides).merged_over(cls(**values))

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a copy with ``changes``, validated and derived anew; raises InvalidArgumentError."""
        return SamplingParams(**{**self.given(), **changes})

    def merged_over(self, defaults: SamplingParams) -> SamplingParams:
        """Return these parameters with ``defaults`` for what wasn't given here.

        A field given here wins, then one given in ``defaults``, then the field's own default. If this side means
        another strategy than ``defaults`` (by naming it, or by a temperature or number of beams), then the fields of
        ``defaults`` that belong to its strategy alone don't come along; temperature 0 means GREEDY over sampling
        defaults. A ``min_tokens`` of ``defaults`` is cut to the ``max_tokens`` given here.

        Raises:
            InvalidArgumentError: if the combination contradicts itself.
        """
        own, base = self.given(), defaults.given()
        strategy = self._intended_strategy(defaults.strategy)
        if strategy is not defaults.strategy:
            for name in _fields_left_behind(strategy, defaults):
                base.pop(name, None)
        merged = {**base, **own}
        if "n" in base and "n" not in own and strategy is DecodingStrategy.BEAM_SEARCH and "num_beams" in own:
            merged["n"] = min(base["n"], self.num_beams)
        if "min_tokens" in base and "min_tokens" not in own:
            merged["min_tokens"] = min(base["min_tokens"], merged.get("max_tokens", self.max_tokens))
        return SamplingParams(**merged)

    def _intended_strategy(self, default: DecodingStrategy) -> DecodingStrategy:
        """Return the strategy that the given fields ask for, ``default`` if they don't."""
        given = self.model_fields_set
        if "strategy" in given:
            return self.strategy
        implied = _implied_strategy(self.temperature, self.num_beams)
        if implied is None and "temperature" in given and default is DecodingStrategy.SAMPLING:
            return DecodingStrategy.GREEDY
        return implied or default


def _implied_strategy(temperature: float, num_beams: int) -> DecodingStrategy | None:
    if num_beams > 1:
        return DecodingStrategy.BEAM_SEARCH
    return DecodingStrategy.SAMPLING if temperature > 0 else None


def _fields_left_behind(strategy: DecodingStrategy, defaults: SamplingParams) -> set[str]:
    """Return the fields of ``defaults`` that mean nothing, or something else, under another ``strategy``."""
    left = {"strategy", "num_beams"}
    if strategy is not DecodingStrategy.SAMPLING or defaults.temperature == 0:
        left.add("temperature")
    if strategy in (DecodingStrategy.BEAM_SEARCH, DecodingStrategy.CONTRASTIVE):
        left.add("n")
    if DecodingStrategy.CONTRASTIVE in (strategy, defaults.strategy):
        left.add("top_k")
    return left


_PRESETS: dict[SamplingPreset, dict[str, Any]] = {
    SamplingPreset.DETERMINISTIC: {"strategy": DecodingStrategy.GREEDY, "temperature": 0.0},
    SamplingPreset.PRECISE: {"strategy": DecodingStrategy.SAMPLING, "temperature": 0.3, "top_p": 0.8, "top_k": 20},
    SamplingPreset.BALANCED: {"strategy": DecodingStrategy.SAMPLING, "temperature": 0.7, "top_p": 0.9},
    SamplingPreset.CREATIVE: {
        "strategy": DecodingStrategy.SAMPLING,
        "temperature": 1.0,
        "top_p": 0.95,
        "presence_penalty": 0.4,
    },
}
