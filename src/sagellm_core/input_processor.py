"""From a request as the protocol has it to requests the engine core can run.

Holds `InputProcessor` and `generation_defaults`. It promises: what comes out is complete and valid, so that nothing
behind it checks again: token ids within the vocabulary, room for at least one new token, every sampling parameter
resolved, a concrete seed. What is wrong with a request is said here, before it costs anything, as one
`InvalidArgumentError` naming the field and the remedy.

Sampling parameters come from the first that gave them: the request, the engine's `sampling_defaults`, the model's
`generation_config.json`, the protocol's defaults. Only `max_tokens` ends at the engine's `max_new_tokens` instead of
the model's. Whatever was asked for, prompt and output together never exceed `max_model_len` (or the request's
`kv_budget_tokens`): `max_tokens` is cut to what is left.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from sagellm_core.chat_template import PLAIN_CHAT_STOP
from sagellm_core.decoding import child_request
from sagellm_core.engine_core.types import EngineCoreRequest
from sagellm_core.json_limits import check_structure
from sagellm_protocol.embedding import EmbedParams
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.fields import MAX_SEED, MAX_STOP_STRINGS
from sagellm_protocol.messages import ChatMessage, Tool
from sagellm_protocol.model_description import TokenizeRequest
from sagellm_protocol.request import Request
from sagellm_protocol.sampling import DecodingStrategy, SamplingParams

if TYPE_CHECKING:
    from sagellm_core.models.config import ModelConfig
    from sagellm_core.structured import Grammar
    from sagellm_core.tokenizer import Tokenizer

__all__ = ["InputProcessor", "generation_defaults"]

_NEUTRAL_TEMPERATURE = 1.0

# More than texts have; whether a longer one fits is first seen from its beginning.
_CHARS_PER_TOKEN = 16
_MOST_CHARS_PER_TOKEN = 64  # of a text that may be cut; what stands behind isn't looked at
_STRATEGIES_WITH_GRAMMAR = (DecodingStrategy.GREEDY, DecodingStrategy.SAMPLING)


class InputProcessor:
    """Tokenises, validates and resolves requests for one model; stateless, safe to share between threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_config: ModelConfig,
        *,
        defaults: SamplingParams | None = None,
        default_max_tokens: int = 128,
        max_model_len: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = model_config.spec.vocab_size
        self._hidden_size = model_config.spec.hidden_size
        self._makes_no_text = model_config.is_embedding
        self._pooling = model_config.pooling.pooling
        self._model_max_len = model_config.max_model_len
        self._max_model_len = max_model_len
        self._default_max_tokens = default_max_tokens
        self._defaults = (defaults or SamplingParams()).merged_over(generation_defaults(model_config.generation_config))
        # Chat models often end a turn with a token that only the tokenizer names.
        eos_token_ids = (*model_config.eos_token_ids, *tokenizer.eos_token_ids)
        self.eos_token_ids = frozenset(token_id for token_id in eos_token_ids if token_id < self._vocab_size)

    def process(
        self, request: Request, *, arrival_time: float = 0.0, grammar: Grammar | None = None
    ) -> list[EngineCoreRequest]:
        """The `n` sequences that `request` asks for, each with a seed and an id of its own.

        `arrival_time` is in seconds of the engine's monotonic clock, `grammar` is the request's `structured_output`,
        compiled. Raises `InvalidArgumentError`.
        """
        if request.embed is not None:
            return [self._for_embedding(request, request.embed, arrival_time)]
        if self._makes_no_text:
            raise InvalidArgumentError(
                "this model makes vectors of texts, no text; ask for embeddings or name another model", field="model"
            )
        prompt_token_ids = self._prompt_ids(request)
        sampling = self._resolve_sampling(request, len(prompt_token_ids))
        self._check_token_ids(sampling.stop_token_ids, "stop_token_ids")
        self._check_token_ids(sampling.logit_bias or (), "logit_bias")
        if grammar is not None and sampling.strategy not in _STRATEGIES_WITH_GRAMMAR:
            raise InvalidArgumentError(
                f"structured_output does not go with strategy {sampling.strategy}; use greedy or sampling",
                field="structured_output",
            )
        core = EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            eos_token_ids=self.eos_token_ids,
            priority=int(request.priority),
            arrival_time=arrival_time,
            cache_salt=request.cache_salt,
            lora_id=request.lora,
            # A cached token was not computed here, so its logprob would be missing.
            read_prefix_cache=sampling.prompt_logprobs is None,
            seed=_seed(request, sampling),
            grammar=grammar,
        )
        children = [child_request(core, index) for index in range(sampling.n)]
        if request.resume_from is None or not request.resume_from.output_token_ids:
            return children
        return self._resumed(children, request.resume_from.output_token_ids)

    def _resumed(
        self, children: Sequence[EngineCoreRequest], output_token_ids: Sequence[Sequence[int]]
    ) -> list[EngineCoreRequest]:
        if len(output_token_ids) != len(children):
            raise InvalidArgumentError(
                f"resume_from.output_token_ids holds {len(output_token_ids)} lists, the request asks for "
                f"{len(children)} outputs; give one list each",
                field="resume_from.output_token_ids",
            )
        for token_ids in output_token_ids:
            self._check_token_ids(token_ids, "resume_from.output_token_ids")
        pairs = zip(children, output_token_ids, strict=True)
        return [replace(child, resumed_token_ids=tuple(token_ids)) for child, token_ids in pairs]

    def _for_embedding(self, request: Request, wanted: EmbedParams, arrival_time: float) -> EngineCoreRequest:
        if wanted.dimensions is not None and wanted.dimensions > self._hidden_size:
            raise InvalidArgumentError(
                f"dimensions is {wanted.dimensions}, the model's vectors have {self._hidden_size}; ask for no more",
                field="dimensions",
            )
        limit = wanted.truncate_prompt_tokens
        longest = self._max_model_len if limit is None or limit == -1 else limit
        if limit is not None and isinstance(request.prompt, str):
            request = request.model_copy(update={"prompt": request.prompt[: _MOST_CHARS_PER_TOKEN * longest]})
        token_ids = self._prompt_ids(request)
        if limit is not None and len(token_ids) > longest:
            token_ids = self._truncated(request, token_ids, longest)
        if len(token_ids) > self._max_model_len:
            raise InvalidArgumentError(
                f"the input has {len(token_ids)} tokens, the model takes {self._max_model_len}; split it into shorter "
                "texts, or set truncate_prompt_tokens",
                field="prompt",
            )
        return EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=token_ids,
            sampling=SamplingParams(max_tokens=1),
            priority=int(request.priority),
            arrival_time=arrival_time,
            cache_salt=request.cache_salt,
            lora_id=request.lora,
            # Other poolings than the last row need the rows of cached tokens too.
            read_prefix_cache=self._pooling == "last",
            pooling=self._pooling,
        )

    def _truncated(self, request: Request, token_ids: list[int], longest: int) -> list[int]:
        """The first of the text's tokens, with the special tokens that frame it."""
        if not isinstance(request.prompt, str):
            return token_ids[:longest]
        text_ids = self._tokenizer.encode(request.prompt, add_special_tokens=False)
        num_special, size = len(token_ids) - len(text_ids), len(text_ids)
        start = next((k for k in range(num_special + 1) if token_ids[k : k + size] == text_ids), None)
        if start is None or longest <= num_special:
            return token_ids[:longest]
        return [*token_ids[:start], *text_ids[: longest - num_special], *token_ids[start + size :]]

    # ---- the prompt -----------------------------------------------------------------------------------

    def _prompt_ids(self, request: Request) -> list[int]:
        if request.prompt_token_ids is not None:
            field, token_ids = "prompt_token_ids", list(request.prompt_token_ids)
        elif request.messages is not None:
            field, token_ids = "messages", self._encode_chat(request)
        elif isinstance(request.prompt, str):
            self._refuse_hopeless(request, request.prompt)
            field, token_ids = "prompt", self._encode_text(request.prompt)
        else:
            field, token_ids = "prompt", list(request.prompt or ())
        if not token_ids:
            raise InvalidArgumentError(f"{field} is empty; give at least one character or token id", field=field)
        self._check_token_ids(token_ids, field)
        return token_ids

    def tokenize(self, wanted: TokenizeRequest) -> list[int]:
        """The ids of a text or a conversation; an empty text has those that frame it."""
        if wanted.messages is None:
            return self._tokenizer.encode(wanted.prompt or "", wanted.add_special_tokens)
        text = self._render(
            wanted.messages,
            wanted.tools,
            wanted.chat_template_kwargs,
            add_generation_prompt=wanted.add_generation_prompt,
        )
        return self._encode_rendered(text)

    def _encode_text(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(prompt) if prompt else []

    def _encode_chat(self, request: Request) -> list[int]:
        text = self._render(request.messages or (), request.tools, request.chat_template_kwargs)
        self._refuse_hopeless(request, text)
        return self._encode_rendered(text)

    def _encode_rendered(self, text: str) -> list[int]:
        """A template writes its own special tokens; the plain form gets them like any text."""
        return self._tokenizer.encode(text, add_special_tokens=not self._tokenizer.has_chat_template)

    def _refuse_hopeless(self, request: Request, text: str) -> None:
        """Raise for a text that cannot fit, by its beginning: to split 8 MB would take seconds and gigabytes."""
        longest = _CHARS_PER_TOKEN * self._max_model_len
        may_be_cut = request.embed is not None and request.embed.truncate_prompt_tokens is not None
        if len(text) <= longest or may_be_cut:
            return
        num_tokens = len(self._tokenizer.encode(text[:longest], add_special_tokens=False))
        # Where the text is cut, its last tokens may be others than in the whole.
        if num_tokens > self._max_model_len + self._max_model_len // 8 + 64:
            raise InvalidArgumentError(
                f"the prompt is too long: this model's maximum context length is {self._max_model_len} tokens "
                f"(max_model_len) for prompt and output together, and of {len(text)} characters the first {longest} "
                f"are {num_tokens} already; shorten it",
                field="prompt" if request.messages is None else "messages",
            )

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any] | None,
        **options: Any,
    ) -> str:
        given = dict(variables or {})
        clash = next((name for name in ("messages", "tools", "self") if name in given), None)
        if clash is not None:
            raise InvalidArgumentError(
                f"chat_template_kwargs may not hold {clash}; give the request's own field {clash}",
                field="chat_template_kwargs",
            )
        if not isinstance(given.get("chat_template", ""), str):
            raise InvalidArgumentError(
                "chat_template_kwargs.chat_template must be the name of one of the model's templates",
                field="chat_template_kwargs",
            )
        if tools is not None:
            given["tools"] = [tool.model_dump(mode="json", exclude_none=True) for tool in tools]
        chat = [_template_message(message) for message in messages]
        return self._tokenizer.apply_chat_template(chat, **{**options, **given})

    def _check_token_ids(self, token_ids: Iterable[int], field: str) -> None:
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < self._vocab_size), None)
        if wrong is not None:
            raise InvalidArgumentError(
                f"{field} holds the token id {wrong}, the model's vocabulary ends at {self._vocab_size - 1}; "
                "use ids of this model's tokenizer",
                field=field,
            )

    # ---- sampling -------------------------------------------------------------------------------------

    def _resolve_sampling(self, request: Request, num_prompt_tokens: int) -> SamplingParams:
        sampling = request.resolved_sampling(self._defaults)
        changes: dict[str, Any] = {}
        wanted = sampling.max_tokens if "max_tokens" in sampling.model_fields_set else self._default_max_tokens
        room = self._room(request, num_prompt_tokens)
        if sampling.strategy is DecodingStrategy.CONTRASTIVE:
            room = max(1, room - 1)  # it looks one token ahead
        max_tokens = min(wanted, room)
        if max_tokens != sampling.max_tokens:
            changes = {"max_tokens": max_tokens, "min_tokens": min(sampling.min_tokens, max_tokens)}
        if request.messages is not None and not self._tokenizer.has_chat_template:
            changes["stop"] = tuple(dict.fromkeys((*sampling.stop, *PLAIN_CHAT_STOP)))[:MAX_STOP_STRINGS]
        return sampling.replace(**changes) if changes else sampling

    def _room(self, request: Request, num_prompt_tokens: int) -> int:
        """How many tokens fit behind the prompt; raises if none does."""
        limit, name = self._max_model_len, "max_model_len"
        # By these words clients know that a conversation must be shortened.
        problem = f"this model's maximum context length is {limit} tokens (max_model_len)"
        if request.kv_budget_tokens is not None and request.kv_budget_tokens < limit:
            limit, name = request.kv_budget_tokens, "kv_budget_tokens"
            problem = f"kv_budget_tokens is {limit}"
        if num_prompt_tokens < limit:
            return limit - num_prompt_tokens
        can_grow = name == "kv_budget_tokens" or limit < self._model_max_len
        raise InvalidArgumentError(
            f"the prompt is too long: {problem} for prompt and output together, and it has {num_prompt_tokens}; "
            f"shorten it to at most {limit - 1} tokens" + (f" or raise {name}" if can_grow else ""),
            field="prompt" if request.messages is None else "messages",
        )


def _seed(request: Request, sampling: SamplingParams) -> int:
    if request.resume_from is not None:
        return request.resume_from.seed
    return secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed


def generation_defaults(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What a model's `generation_config.json` recommends, as sampling parameters.

    As Hugging Face reads it: temperature, top_p, top_k and min_p count only with `do_sample`, `repetition_penalty`
    always. Hugging Face's own `top_k` of 50 where the file names none is not taken over, nor are its lengths.
    """
    names = ["repetition_penalty"]
    if generation_config.get("do_sample"):
        names += ["temperature", "top_p", "top_k", "min_p"]
    fields = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("do_sample"):
        fields.setdefault("temperature", _NEUTRAL_TEMPERATURE)
    try:
        return SamplingParams(**fields)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(
            f"the model's generation_config.json: {error.message}", field=error.context.get("field")
        ) from error


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message for the chat template; a tool call's arguments as an object, which is what templates expect."""
    values = message.to_template()
    for call in values.get("tool_calls", ()):
        text = call["function"]["arguments"]
        check_structure(text.encode("utf-8", errors="replace"))
        try:
            arguments = from_json(text)
        except ValueError:
            continue  # not JSON: the model gets to see what it wrote
        if isinstance(arguments, dict):
            call["function"]["arguments"] = arguments
    return values
