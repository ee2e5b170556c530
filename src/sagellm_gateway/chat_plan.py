"""How a chat request is carried out: the engine's request, the form its text must have, and who reads that text.

A model's chat template says how it writes tool calls and thoughts. `tool_choice` decides what is demanded: `auto`
leaves the text free (and holds strict tools to their schemas once a call begins), or lets it be calls or the form that
the request asks for; `required` and a named function force at least one call. What a model's template cannot do is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sagellm_gateway import reasoning, tool_formats
from sagellm_gateway.choice_reader import ChoiceReader, plain_choice
from sagellm_gateway.context import Caller
from sagellm_gateway.pieces import AnswerChoice
from sagellm_gateway.reasoning import ReasoningFormat
from sagellm_gateway.tool_formats import ToolFormat
from sagellm_protocol import (
    ChatMessage,
    ModelDescription,
    Request,
    StructuredOutput,
    Tool,
    UnsupportedError,
)
from sagellm_protocol.openai import ChatCompletionRequest, NamedToolChoice
from sagellm_protocol.openai.common import FORM_FIELDS
from sagellm_protocol.response import CompletionOutput

if TYPE_CHECKING:
    from sagellm_gateway.app import Gateway

# What makes a request's form and its template's variables; a call without them is carried out as it is.
_PLANNED_FIELDS = FORM_FIELDS | {"tools", "tool_choice", "reasoning_effort", "chat_template_kwargs"}
_NO_THOUGHT = ("none", "minimal")
_SWITCH = "enable_thinking"  # the variable of Qwen3's, SmolLM3's and others' templates
_EFFORT = "reasoning_effort"


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """What a model's chat template tells of its notation."""

    tools: ToolFormat
    reasoning: ReasoningFormat | None
    knows_tools: bool  # the template shows the model its tools
    has_switch: bool  # the template can switch thoughts off
    has_effort: bool


@lru_cache(maxsize=64)
def formats_of(chat_template: str | None) -> ModelFormats:
    """The formats of a template's family."""
    text = chat_template or ""
    return ModelFormats(
        tool_formats.for_template(chat_template),
        reasoning.for_template(chat_template),
        knows_tools="tools" in text,
        has_switch=_SWITCH in text,
        has_effort=_EFFORT in text,
    )


@dataclass(slots=True)
class ChatPlan:
    """A request on its way, and how its answer is read."""

    request: Request
    formats: ModelFormats
    tools: Sequence[Tool]  # that the text may call
    opens_thought: bool = False
    one_call: bool = False
    is_named: bool = False

    def read(self, output: CompletionOutput) -> AnswerChoice:
        """One whole choice, out of its text."""
        if not self.tools and self.formats.reasoning is None:
            return plain_choice(output)
        return self.reader(output.index).read(output)

    def reader(self, index: int) -> ChoiceReader:
        """A reader for the text of one choice."""
        thoughts = self.formats.reasoning
        return ChoiceReader(
            index,
            reasoning=None if thoughts is None else thoughts.parser(index, self.opens_thought),
            tools=self.formats.tools.parser(index, list(self.tools)) if self.tools else None,
            one_call=self.one_call,
            reports_calls=not self.is_named,
        )


class ChatPlanner:
    """Makes plans through the gateway's control plane."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._known: dict[str, _Probes] = {}  # of each model that was asked for, by its name

    async def plan(self, call: ChatCompletionRequest, caller: Caller) -> ChatPlan:
        """How to carry out a call, in its caller's name.

        Raises `InvalidArgumentError` or `UnsupportedError` for what cannot be done, naming the field.
        """
        model = await self._gateway.manager.describe_model(call.model)
        formats = formats_of(model.chat_template)
        request = call.to_request(**caller.request_fields())
        if formats.reasoning is None and call.model_fields_set.isdisjoint(_PLANNED_FIELDS):
            return ChatPlan(request, formats, ())
        tools = call.usable_tools
        changes: dict[str, Any] = {}
        has_form = bool(tools) or request.structured_output is not None
        token_ids = await self._token_ids_of_marks(model, formats) if has_form else {}
        form = _form_of(call, formats, tools, request.structured_output, token_ids)
        variables = _variables(call, formats, is_formed=form is not None)
        if variables != call.chat_template_kwargs:
            changes["chat_template_kwargs"] = variables
        opens = formats.reasoning is not None and await self._opens_thought(model, formats.reasoning, variables)
        if _shows_marks(formats, tools) and request.sampling_params is not None:
            changes["sampling_params"] = request.sampling_params.replace(skip_special_tokens=False)
        if form is not None:
            changes["structured_output"] = form
            if opens and formats.reasoning is not None:
                changes["structured_output"] = formats.reasoning.after_thought(form, token_ids=token_ids)
        return ChatPlan(
            request.model_copy(update=changes) if changes else request,
            formats,
            tools,
            opens_thought=opens,
            one_call=call.parallel_tool_calls is False,
            is_named=isinstance(call.tool_mode, NamedToolChoice),
        )

    async def _opens_thought(
        self, model: ModelDescription, thoughts: ReasoningFormat, variables: dict[str, Any] | None
    ) -> bool:
        """Whether the prompt that the template renders ends within a thought; asked once for each set of variables."""
        opening, key = self._probes_of(model).opening, json.dumps(variables, sort_keys=True)
        if key not in opening:
            manager = self._gateway.manager
            probe = [ChatMessage(role="user", content="Hello")]
            token_ids = await manager.tokenize(model.model, messages=probe, chat_template_kwargs=variables)
            if len(opening) >= _MAX_OPENINGS:
                opening.clear()
            opening[key] = thoughts.is_open(await manager.detokenize(model.model, token_ids))
        return opening[key]

    async def _token_ids_of_marks(self, model: ModelDescription, formats: ModelFormats) -> dict[str, int]:
        """The marks that are tokens of the model, which a grammar must name as such; asked once for a model."""
        probes = self._probes_of(model)
        if probes.marks is None:
            manager, found = self._gateway.manager, dict[str, int]()
            for mark in (*formats.tools.marks, *(formats.reasoning.marks if formats.reasoning is not None else ())):
                for token_id in await manager.tokenize(model.model, prompt=mark, add_special_tokens=False):
                    if await manager.detokenize(model.model, [token_id]) == mark:
                        found[mark] = token_id
            probes.marks = found
        return probes.marks

    def _probes_of(self, model: ModelDescription) -> _Probes:
        """What is known of a model; nothing yet of one that has come to another's name."""
        probes = self._known.get(model.model)
        if probes is None or probes.model is not model:
            if len(self._known) >= _MAX_MODELS:
                self._known.clear()
            probes = self._known[model.model] = _Probes(model)
        return probes


@dataclass(slots=True)
class _Probes:
    """What a model's tokenizer and template answered."""

    model: ModelDescription
    marks: dict[str, int] | None = None
    opening: dict[str, bool] = field(default_factory=dict)  # by the template's variables


_MAX_MODELS = 64
_MAX_OPENINGS = 256


def _shows_marks(formats: ModelFormats, tools: Sequence[Tool]) -> bool:
    """Whether the text must keep its special tokens, because they are what a parser looks for."""
    thoughts = formats.reasoning
    return (bool(tools) and formats.tools.marks_are_special) or (thoughts is not None and thoughts.marks_are_special)


def _form_of(
    call: ChatCompletionRequest,
    formats: ModelFormats,
    tools: list[Tool],
    form: StructuredOutput | None,
    token_ids: Mapping[str, int],
) -> StructuredOutput | None:
    """The form of the text: that of the calls it must hold, or what the request asks for."""
    if not tools:
        return form
    parallel = call.parallel_tool_calls is not False
    if call.tool_mode == "required":
        return formats.tools.grammar(tools, only=None, parallel=parallel, token_ids=token_ids)
    if isinstance(call.tool_mode, NamedToolChoice):
        only = call.tool_mode.function.name
        return formats.tools.grammar(tools, only=only, parallel=parallel, token_ids=token_ids)
    if not formats.knows_tools:
        raise UnsupportedError(
            f"tools are not supported by {call.model}: its chat template has no place for them; "
            "set tool_choice to 'required', leave tools out, or use another model",
            field="tools",
        )
    if form is not None:
        return formats.tools.grammar_beside(form, tools, parallel=parallel, token_ids=token_ids)
    if any(tool.function.strict for tool in tools):
        return formats.tools.lazy_grammar(tools, parallel=parallel, token_ids=token_ids)
    return None


def _variables(call: ChatCompletionRequest, formats: ModelFormats, *, is_formed: bool) -> dict[str, Any] | None:
    """The template's variables: a form leaves no room for thoughts, where the template can do without them."""
    given = dict(call.chat_template_kwargs or {})
    effort = call.reasoning_effort
    if effort is not None:
        if formats.has_effort:
            given.setdefault(_EFFORT, effort)
        elif formats.has_switch:
            given.setdefault(_SWITCH, effort not in _NO_THOUGHT)
        elif effort not in _NO_THOUGHT:
            raise UnsupportedError(
                f"reasoning_effort is not supported: {call.model} does not think before it answers; leave it out",
                field="reasoning_effort",
            )
    if is_formed and formats.has_switch:
        given.setdefault(_SWITCH, False)
    return given or None
