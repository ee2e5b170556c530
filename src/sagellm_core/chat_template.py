"""Chat templates: a conversation in, the prompt text of a model out.

Holds `ChatTemplate` (one compiled jinja2 template), `ChatTemplates` (the named templates of a model, chosen as Hugging
Face does) and `render_plain_chat` (what base models without a template get). Templates come from strangers: they run in
jinja2's immutable sandbox and see plain JSON data only. What they render equals `transformers`' own rendering; every
failure is an `InvalidArgumentError`, because it is the messages that the caller can change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from sagellm_protocol.errors import InvalidArgumentError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

__all__ = ["PLAIN_CHAT_STOP", "ChatTemplate", "ChatTemplates", "render_plain_chat"]

#: Stop strings that end a turn of the plain rendering, where no special token does.
PLAIN_CHAT_STOP: tuple[str, ...] = ("\nUser:",)

_PLAIN_SPEAKERS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "PROBE-OF-CONTENT"


class ChatTemplate:
    """One jinja2 chat template, compiled at the first use; safe to share between threads.

    `clock` serves the template's `strftime_now`, so that a test can fix the date.
    """

    def __init__(self, source: str, *, clock: Callable[[], datetime] = datetime.now) -> None:
        self.source = source
        self._clock = clock

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text for `messages`; `variables` (bos_token, enable_thinking, ...) are visible to the template.

        `continue_final_message` leaves the last message open, so that the model continues it.
        Raises `InvalidArgumentError` if the template refuses the messages or fails on them.
        """
        chat = [self._shaped(message) for message in _plain_messages(messages)]
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidArgumentError(
                    "continue_final_message continues the last message and add_generation_prompt starts a new one; "
                    "set only one of them",
                    field="continue_final_message",
                )
            _mark_end(chat)
        text = self._render(
            {
                **_plain(variables),
                "messages": chat,
                "tools": _plain(tools),
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _shaped(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content as this template reads it: a string, or a list of parts where it wants one."""
        content = message.get("content")
        if isinstance(content, list) and not self._wants_parts:
            return {**message, "content": _joined_text(content)}
        if isinstance(content, str) and self._wants_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows content only when it is a list of parts; found by rendering a probe both ways."""
        return not self._shows_probe(_PROBE) and self._shows_probe([{"type": "text", "text": _PROBE}])

    def _shows_probe(self, content: Any) -> bool:
        probe = {"messages": [{"role": "user", "content": content}], "tools": None, "add_generation_prompt": True}
        try:
            text = self._render(probe)
        except InvalidArgumentError:
            return False
        return _PROBE in text and "'type'" not in text  # a list printed as it is shows the probe in Python's spelling

    def _render(self, variables: Mapping[str, Any]) -> str:
        import jinja2

        template = self._template
        try:
            return template.render({"documents": None, **variables})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidArgumentError(
                f"the model's chat template cannot render these messages: {str(error).rstrip('.')}; check the roles, "
                "their order and that every message has the content the template expects",
                field="messages",
            ) from error

    @cached_property
    def _template(self) -> Template:
        import jinja2

        try:
            return _environment(self._clock).from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidArgumentError(
                f"the model's chat template is not valid jinja2 (line {error.lineno}: {error.message}); "
                "repair chat_template in the model folder, or send a text prompt instead of messages",
                field="chat_template",
            ) from error


class ChatTemplates:
    """The templates of one model by name; `default` serves unless tools are given and `tool_use` exists."""

    def __init__(self, sources: Mapping[str, str], *, clock: Callable[[], datetime] = datetime.now) -> None:
        self._templates = {name: ChatTemplate(source, clock=clock) for name, source in sources.items()}

    def __len__(self) -> int:
        return len(self._templates)

    def choose(self, *, with_tools: bool = False, name: str | None = None) -> ChatTemplate:
        """The template called `name`, else Hugging Face's choice. Raises `InvalidArgumentError` for an unknown name."""
        wanted = name or ("tool_use" if with_tools and "tool_use" in self._templates else "default")
        if wanted not in self._templates:
            raise InvalidArgumentError(
                f"the model has no chat template named {wanted!r}; it has: {', '.join(sorted(self._templates))}",
                field="chat_template",
            )
        return self._templates[wanted]


def render_plain_chat(messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """`User: ...` and `Assistant: ...` lines, for models that were never trained on a chat format.

    A base model continues such a dialogue sensibly; `PLAIN_CHAT_STOP` ends its turn.
    """
    lines = []
    for message in _plain_messages(messages):
        role, content = message["role"], message.get("content", "")
        text = _joined_text(content) if isinstance(content, list) else str(content)
        lines.append(f"{_PLAIN_SPEAKERS.get(role, role.capitalize())}: {text.strip()}")
    return "\n".join([*lines, "Assistant:"] if add_generation_prompt else lines)


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Checked copies of the messages as plain data, without None values, reasoning under all its names."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidArgumentError(
            "messages must be a list with at least one {'role': ..., 'content': ...}", field="messages"
        )
    return [_plain_message(index, message) for index, message in enumerate(messages)]


def _plain_message(index: int, message: Any) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
        raise InvalidArgumentError(
            f"messages[{index}] must be an object with a string `role` and a `content`", field=f"messages[{index}]"
        )
    # Templates test whether a key is there; APIs send null for a key that is not.
    plain = {key: value for key, value in plain.items() if value is not None}
    _check_content(index, plain.get("content"))
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _check_content(index: int, content: Any) -> None:
    where = f"messages[{index}].content"
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InvalidArgumentError(
            f"{where} must be a string or a list of text parts, got {type(content).__name__}", field=where
        )
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InvalidArgumentError(
                f"{where} holds a part of type {kind!r}; this engine reads text only", field=where
            )


def _joined_text(parts: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(str(part["text"]) for part in parts)


def _plain(value: Any) -> Any:
    """`value` rebuilt of plain JSON types, so that a template cannot reach the methods of richer objects."""
    if isinstance(value, str):
        return str.__str__(value)  # an enum member becomes its text
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    dump = getattr(value, "model_dump", None)  # a pydantic model of the protocol
    if callable(dump):
        return _plain(dump(exclude_none=True))
    raise InvalidArgumentError(f"chat messages hold JSON data only, got {type(value).__name__}", field="messages")


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Append a mark to the last message's text, in place; the rendering is cut there."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1] = {**chat[-1], "content": content + _CONTINUE_MARK}
    elif content:
        chat[-1] = {
            **chat[-1],
            "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + _CONTINUE_MARK}],
        }
    else:
        raise InvalidArgumentError("continue_final_message needs text in the last message", field="messages")


def _cut_at_mark(text: str) -> str:
    position = text.rfind(_CONTINUE_MARK.strip())
    if position < 0:
        raise InvalidArgumentError(
            "the model's chat template drops the last message's text, so it cannot be continued; end with another role",
            field="continue_final_message",
        )
    kept = text[:position]
    # A template that trims the message has eaten the mark's trailing space, and would have eaten the text's own.
    return kept if text[position:].startswith(_CONTINUE_MARK) else kept.rstrip()


def _environment(clock: Callable[[], datetime]) -> Environment:
    """The jinja2 environment that chat templates are written for (the names and flags are Hugging Face's)."""
    import jinja2
    from jinja2 import ext, nodes, parser, sandbox

    class GenerationTag(ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks what training learns from; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)  # what is set inside stays inside

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML, which a prompt must not.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: clock().strftime(pattern)
    return environment
