"""Options that several commands take, each declared once, and the groups that they come in.

A command takes a group as one parameter of the group's dataclass; `with_flags` spreads it out on the command line. The
names that a shell completes come from here, too: none of them costs an import of torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Let each parameter whose type is a dataclass of options stand for all of them; for `typer.Typer.command`."""
    hints = get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            parameters += [_keyword(field.name, types[field.name], field.default) for field in fields(groups[name])]
        else:
            parameters.append(_keyword(name, hints[name], parameter.default))

    def command(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        function(**values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# ---- completion ---------------------------------------------------------------------------------------


def complete_model(incomplete: str) -> list[str]:
    """The models on this machine, as `sage-llm list` names them."""
    from sagellm_core.models import list_local_models

    return [model.name for model in list_local_models() if model.name.startswith(incomplete)]


def complete_backend(incomplete: str) -> list[str]:
    """The kinds of devices: the built-in ones and those that other distributions add."""
    from importlib.metadata import entry_points

    foreign = {point.name for point in entry_points(group="sagellm.backends")} - {"mock"}
    kinds = ["auto", "cpu", "cuda", "ascend", "kunlun", "haiguang"]
    return _beginning(incomplete, [*kinds, *sorted(foreign - set(kinds))])


def complete_quantization(incomplete: str) -> list[str]:
    """The forms that weights can be rounded to."""
    return _beginning(incomplete, ["none", "int8", "int4", "int4-g64", "int4-g128", "int4-asym"])


def complete_dtype(incomplete: str) -> list[str]:
    """The types that weights can have."""
    return _beginning(incomplete, ["auto", "fp32", "fp16", "bf16"])


def _beginning(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


# ---- options ------------------------------------------------------------------------------------------

Backend = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, ascend, kunlun or haiguang.", autocompletion=complete_backend),
]
MaxModelLen = Annotated[int | None, typer.Option(help="Prompt + output tokens of one request.")]
MaxBatchSize = Annotated[int | None, typer.Option(help="Requests that run at the same time.")]
NumThreads = Annotated[int | None, typer.Option(help="Compute threads. Default: the cores we may use.", min=1)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the engine's log.")]


@dataclass(frozen=True)
class EngineFlags:
    """Which model to run, and how; None leaves it to the configuration."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="`builtin`, a folder, a .gguf file or a hub id. Default: the configuration's.",
            autocompletion=complete_model,
        ),
    ] = None
    backend: Backend = None
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights: auto, fp32, fp16 or bf16.", autocompletion=complete_dtype),
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Weights in whole numbers: int8, int4, int4-g64, int4-g128 or int4-asym.",
            autocompletion=complete_quantization,
        ),
    ] = None
    max_model_len: MaxModelLen = None
    max_batch_size: MaxBatchSize = None
    num_threads: NumThreads = None

    def options(self) -> dict[str, Any]:
        """The fields of `LLMEngineConfig` that were given, besides model and backend."""
        names = [field.name for field in fields(self) if field.name not in ("model", "backend")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
