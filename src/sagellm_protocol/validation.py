"""Turn pydantic's list of line errors into one sentence a user can act on.

Used by :mod:`sagellm_protocol.model`, and for the tagged union of stream events. ``prompt: value is not a valid string;
prompt: value is not a valid list`` helps nobody; the functions here merge the branches of a union, put the field's path
in front, show the value that was refused and append the field's remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.model import Remedy

_MAX_REPORTED = 3
_MAX_READ = 100  # of what a hostile body may cause
_MAX_SHOWN_CHARS = 60
_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_BOUND_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_NOUNS = {
    "bool": "true or false",
    "bytes": "bytes",
    "dict": "an object",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "mapping": "an object",
    "model": "an object",
    "string": "a string",
    "tuple": "a list",
}


@dataclass(frozen=True)
class _Problem:
    """One refused value: where it stands, which union it belongs to, and what is wrong."""

    path: str
    group: str | None  # path of the field whose union branches are merged
    depth: int
    noun: str | None  # what was expected, if the type or choice itself was wrong
    text: str
    is_fit: bool = True  # the value had the right type and shape, only not a permitted content


def invalid_argument(
    error: ValidationError, models: Sequence[type[BaseModel]], *, what: str | None = None
) -> InvalidArgumentError:
    """Return the InvalidArgumentError that says what ``error`` says, in one line.

    Args:
        error: pydantic's report.
        models: the model that was validated (or those of a tagged union); gives field names, remedies and "did you
            mean".
        what: what the data was; the message then starts with ``invalid <what>:``.
    """
    lines = error.errors(include_url=False)
    problems = _merge_unions([_problem(line, models) for line in lines[:_MAX_READ]])
    shown = "; ".join(problem.text for problem in problems[:_MAX_REPORTED])
    hidden = len(problems) - _MAX_REPORTED + max(0, len(lines) - _MAX_READ)
    if hidden > 0:
        shown += f"; and {hidden} more"
    message = f"invalid {what}: {shown}" if what else shown
    return InvalidArgumentError(message, field=problems[0].path or None)


def _problem(line: Any, models: Sequence[type[BaseModel]]) -> _Problem:
    kind, context = line["type"], line.get("ctx", {})
    path, group, field, owner = _locate(line["loc"], models)
    depth = len(line["loc"])
    if kind == "extra_forbidden":
        name = str(line["loc"][-1])
        return _Problem(_join(path, _key(name)), group, depth, None, _unknown_field(path, name, owner), is_fit=False)
    if kind == "value_error":
        return _own_problem(path, group, depth, context["error"])
    if kind.startswith("union_tag"):
        path = _join(path, context["discriminator"].strip("'"))
    noun = _expected(line)
    text = _sentence(path or "value", line, noun)
    remedy = _remedy(field)
    # "is required" and "must be a number, got 'x'" say enough; a bound or a choice may not.
    if remedy and kind != "missing" and noun not in _NOUNS.values():
        text += f"; {remedy}"
    return _Problem(path, group, depth, noun, text, is_fit=noun is None and kind != "missing")


def _own_problem(path: str, group: str | None, depth: int, error: Exception) -> _Problem:
    """Return the problem that one of our validators raised: a whole sentence, usually naming its field."""
    message = str(error)
    inner = error.context.get("field") if isinstance(error, InvalidArgumentError) else None
    if inner is not None and message.startswith(inner):
        return _Problem(_join(path, inner), group, depth, None, _join(path, message))
    inner_path = path if inner is None else _join(path, inner)
    name = path.rsplit(".", 1)[-1]
    if not path or message.startswith(path):
        return _Problem(inner_path, group, depth, None, message)
    text = path.removesuffix(name) + message if message.startswith(name) else f"{path}: {message}"
    return _Problem(inner_path, group, depth, None, text)


def _locate(
    loc: tuple[int | str, ...], models: Sequence[type[BaseModel]]
) -> tuple[str, str | None, FieldInfo | None, type[BaseModel] | None]:
    """Follow ``loc`` through the models; return (path, union group, last field, model that owns the end).

    Parts of ``loc`` that are no field, index or mapping key are pydantic's labels of union branches: left out of the
    path, and the path up to the first of them is the group. At the root they are tags of a tagged union, of which only
    one branch is ever tried.
    """
    owners = list(models)
    path, group, field = "", None, None
    for part in loc:
        known = next((owner.model_fields[part] for owner in owners if part in owner.model_fields), None)
        if known is not None:
            path, field = _join(path, str(part)), known
            owners = list(_models_in(known.annotation))
        elif isinstance(part, int):
            path += f"[{part}]"
        elif field is not None and part != "[key]" and group is None and _has_mapping(field.annotation):
            path += f"[{_key(part)}]"
        elif group is None and path:
            group = path
    return path, group, field, owners[0] if owners else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sentence(subject: str, line: Any, noun: str | None) -> str:
    kind, context = line["type"], line.get("ctx", {})
    got = f", got {_show(context.get('tag', line.get('input')))}"
    if noun is not None:
        return f"{subject} must be {noun}{got}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{subject} is required"
    if kind in _BOUNDS:
        bound = _BOUNDS[kind]
        limit = context[bound]
        return f"{subject} must be {_BOUND_SIGNS[bound]} {int(limit) if limit == int(limit) else limit}{got}"
    if kind.endswith("too_short") and context["min_length"] == 1:
        return f"{subject} must not be empty"
    if kind.endswith("too_long"):
        length = context.get("actual_length") or "more"
        return f"{subject} must have at most {context['max_length']} {_unit(kind)}, got {length}"
    if kind.endswith("too_short"):
        return f"{subject} must have at least {context['min_length']} {_unit(kind)}"
    if kind == "string_pattern_mismatch":
        return f"{subject} has a wrong form{got}"
    if kind == "json_invalid":
        return f"not valid JSON: {context['error']}"
    message = line["msg"]
    return f"{subject}: {message[:1].lower()}{message[1:]}"


def _unit(kind: str) -> str:
    return "characters" if kind.startswith("string") else "entries"


def _expected(line: Any) -> str | None:
    """Return what the value should have been, if it is of a wrong type or not among the choices; else None."""
    kind, context = line["type"], line.get("ctx", {})
    if kind in ("enum", "literal_error"):
        return str(context["expected"])
    if kind == "union_tag_invalid":
        return f"one of {context['expected_tags']}"
    if kind == "finite_number":
        return "a finite number"
    head, _, tail = kind.partition("_")
    is_type = tail in ("type", "parsing", "parsing_size", "from_float", "attributes_type")
    return _NOUNS.get(head) if is_type else None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


def _key(name: str) -> str:
    """Return a name that came from outside as it may stand in a path: plain if it is short and simple."""
    is_plain = len(name) <= _MAX_SHOWN_CHARS and name.replace("_", "").isalnum()
    return name if is_plain else _show(name)


def _unknown_field(path: str, name: str, owner: type[BaseModel] | None) -> str:
    known = list(owner.model_fields) if owner is not None else []
    # Nobody mistypes a whole text, and comparing one would take its time.
    close = difflib.get_close_matches(name, known, n=1) if len(name) <= _MAX_SHOWN_CHARS else []
    advice = f"did you mean {close[0]!r}?" if close else "remove it"
    return f"{_show(name)} is not a field {f'of {path}' if path else 'here'}; {advice}"


def _merge_unions(problems: list[_Problem]) -> list[_Problem]:
    """Keep one problem a union: the one that got furthest, or all expected types in one sentence."""
    groups: dict[str | int, list[_Problem]] = {}
    for number, problem in enumerate(problems):
        groups.setdefault(number if problem.group is None else problem.group, []).append(problem)
    return [_best(members) for members in groups.values()]


def _best(problems: list[_Problem]) -> _Problem:
    """Return what to say of one union: the branch that fits best decides, else all branches' types are named."""
    mistyped = [problem for problem in problems if problem.noun is not None and problem.path == problem.group]
    further = [problem for problem in problems if problem not in mistyped]
    if further:
        return max(further, key=lambda problem: (problem.is_fit, problem.depth))
    first = mistyped[0] if mistyped else problems[0]
    nouns = " or ".join(dict.fromkeys(problem.noun or "" for problem in mistyped))
    return replace(first, text=first.text.replace(first.noun or "", nouns, 1))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _has_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation) or annotation
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return True
    return any(_has_mapping(argument) for argument in get_args(annotation))


def _remedy(field: FieldInfo | None) -> str | None:
    if field is None:
        return None
    return next((entry.text for entry in _metadata(field) if isinstance(entry, Remedy)), None)


def _metadata(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    pending = [field.annotation]
    while pending:
        annotation = pending.pop()
        yield from getattr(annotation, "__metadata__", ())
        pending.extend(get_args(annotation))
