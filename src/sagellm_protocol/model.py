"""The base of every protocol type: pydantic models and text enums that speak the protocol's error.

A :class:`ProtocolModel` is frozen, refuses NaN and infinity, and raises
:class:`~sagellm_protocol.errors.InvalidArgumentError` (never ``pydantic.ValidationError``) from its constructor,
``model_validate``, ``model_validate_json`` and :func:`parse`. The message is one line that names the field, what it got
and what to do; :class:`Remedy` adds the last part where a bound alone doesn't say it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from typing_extensions import Self

    from sagellm_protocol.errors import InvalidArgumentError

ModelT = TypeVar("ModelT", bound=BaseModel)

# Past the constructor and the frozen guard: what an instance is made of.
_new = object.__new__
_set_fields, _set_given, _set_extra, _set_private = (
    vars(BaseModel)[name].__set__
    for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")
)


@dataclass(frozen=True)
class Remedy:
    """Field metadata: the half sentence that tells a user how to repair a refused value of this field.

    Used as ``Annotated[float, Field(ge=0), Remedy("use 0 for greedy decoding")]``.
    """

    text: str


class ProtocolEnum(str, Enum):
    """A text enum whose ``str()`` and ``format()`` are the plain value on every Python version."""

    __str__ = str.__str__
    __hash__ = str.__hash__  # as equality: a member and its value are the same key


class ProtocolModel(BaseModel):
    """A frozen value of the protocol; see the module docstring for what it promises."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())

    def __init__(self, /, **data: Any) -> None:
        """Validate ``data``; raises InvalidArgumentError."""
        try:
            # What pydantic's own does, without the detour: every request makes half a dozen of these.
            self.__pydantic_validator__.validate_python(data, self_instance=self)
        except ValidationError as error:
            raise _invalid_argument(error, type(self)) from error

    # Tells pydantic that this constructor only translates errors, so that nested values are validated in place
    # (and keep their full location) instead of through a call of this constructor each.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, but raises InvalidArgumentError."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _invalid_argument(error, cls) from error

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, but raises InvalidArgumentError (malformed JSON included)."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _invalid_argument(error, cls) from error

    @classmethod
    def of_valid(cls, values: dict[str, Any]) -> Self:
        """Return an instance of values that are known to be what validation makes of them, and of defaults.

        Nothing is checked, converted or derived: for values that come from other validated instances alone, where
        validating them again would cost more than all else.
        """
        defaults, factories = _defaults_of(cls)
        fields = {**defaults, **values}
        for name, make in factories:
            if name not in values:
                fields[name] = make()
        return cls._of(fields, set(values))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, at half its cost: every request is copied on its way."""
        if deep:
            return super().model_copy(update=update, deep=True)
        update = update or {}
        fields = self.__dict__.copy()
        fields.update(update)
        return self._of(fields, self.__pydantic_fields_set__.union(update))

    @classmethod
    def _of(cls, fields: dict[str, Any], given: set[str]) -> Self:
        made: Self = _new(cls)
        _set_fields(made, fields)
        _set_given(made, given)
        # No protocol type keeps unknown fields or has private attributes.
        _set_extra(made, None)
        _set_private(made, None)
        return made

    def given(self) -> dict[str, Any]:
        """Return the fields that were given explicitly (not filled by a default), by name."""
        given = self.model_fields_set
        return {name: getattr(self, name) for name in type(self).model_fields if name in given}


class EdgeModel(ProtocolModel):
    """A request-like value that arrives from outside: a field it doesn't know is an error, not ignored."""

    model_config = ConfigDict(extra="forbid")


class EchoedModel(EdgeModel):
    """A value that clients send back as they keep it; fields of their own (`parsed`, `index`) are ignored."""

    model_config = ConfigDict(extra="ignore")


@cache
def _defaults_of(cls: type[ProtocolModel]) -> tuple[dict[str, Any], tuple[tuple[str, Callable[[], Any]], ...]]:
    """A type's defaults in the order of its fields, and what makes those that each instance has for itself."""
    fields = cls.model_fields
    factories = {name: cast("Callable[[], Any]", field.default_factory) for name, field in fields.items()}
    defaults = {name: None if factories[name] is not None else field.default for name, field in fields.items()}
    return defaults, tuple((name, make) for name, make in factories.items() if make is not None)


def parse(model_cls: type[ModelT], data: Any, *, what: str) -> ModelT:
    """Validate outside data as ``model_cls``; the one place where a ValidationError becomes the protocol's error.

    Args:
        model_cls: any pydantic model class.
        data: an instance (returned as it is), a mapping, or a JSON document as ``str`` or ``bytes``.
        what: what the data is, for the message, e.g. ``"chat completion request"``.

    Raises:
        InvalidArgumentError: one line naming ``what``, the field(s) and the remedy; ``context["field"]`` is the first
            field's path, ``None`` if the data as a whole is wrong.
    """
    validator = model_cls.__pydantic_validator__
    try:
        is_json = isinstance(data, (str, bytes, bytearray))
        result: ModelT = validator.validate_json(data) if is_json else validator.validate_python(data)
    except ValidationError as error:
        raise _invalid_argument(error, model_cls, what=what) from error
    return result


def _invalid_argument(
    error: ValidationError, model_cls: type[BaseModel], *, what: str | None = None
) -> InvalidArgumentError:
    # Imported here because errors.py defines the Error model on top of this module.
    from sagellm_protocol.validation import invalid_argument

    return invalid_argument(error, [model_cls], what=what)
