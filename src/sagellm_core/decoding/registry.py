"""The decoding strategies by name; a class is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from sagellm_core.decoding.base import BaseDecodingStrategy
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.sampling import DecodingStrategy

# Name -> "module:class".
_STRATEGIES = {
    DecodingStrategy.GREEDY.value: "sagellm_core.decoding.sampling:GreedyDecoding",
    DecodingStrategy.SAMPLING.value: "sagellm_core.decoding.sampling:SamplingDecoding",
    DecodingStrategy.BEAM_SEARCH.value: "sagellm_core.decoding.beam_search:BeamSearchDecoding",
    DecodingStrategy.CONTRASTIVE.value: "sagellm_core.decoding.contrastive:ContrastiveDecoding",
}


def get_strategy(strategy: DecodingStrategy | str) -> BaseDecodingStrategy:
    """An instance of the strategy of that name.

    Raises:
        InvalidArgumentError: nobody registered the name; the message lists the known ones.
    """
    name = _name(strategy)
    if name not in _STRATEGIES:
        raise InvalidArgumentError(
            f"unknown decoding strategy {name!r}; use one of {', '.join(available_strategies())}", field="strategy"
        )
    module, _, attribute = _STRATEGIES[name].partition(":")
    strategy_class: type[BaseDecodingStrategy] = getattr(import_module(module), attribute)
    return strategy_class()


def register_strategy(strategy: DecodingStrategy | str, target: str) -> None:
    """Let `get_strategy(strategy)` return an instance of the class at `target` ("package.module:Class").

    Replaces what stood under that name, so that a third party can bring its own beam search. Call it while the program
    is set up, before engines run.

    Raises:
        InvalidArgumentError: `target` doesn't have the form "package.module:Class".
    """
    module, separator, attribute = target.partition(":")
    if not (module and separator and attribute.isidentifier()):
        raise InvalidArgumentError(
            f"a decoding strategy is registered as 'package.module:Class', got {target!r}", field="target"
        )
    _STRATEGIES[_name(strategy)] = target


def available_strategies() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_STRATEGIES))


def _name(strategy: DecodingStrategy | str) -> str:
    return strategy.value if isinstance(strategy, DecodingStrategy) else strategy
