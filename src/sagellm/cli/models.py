"""`sage-llm list` and `sage-llm pull`: the models on this machine, and getting more."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sagellm_core.command import print_quietly
from sagellm_protocol import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm_core.models import LocalModel


def list_command(*, as_json: bool) -> None:
    """Print the built-in model and those in the hub's cache."""
    from sagellm_core.models import list_local_models

    models = [describe(model) for model in list_local_models()]
    if as_json:
        print(json.dumps(models, indent=2, ensure_ascii=False))
    else:
        Console().print(models_table(models))


def describe(model: LocalModel) -> dict[str, Any]:
    """A model on this machine as plain JSON values."""
    return {"name": model.name, "path": str(model.path), "num_bytes": model.num_bytes, "source": model.source}


def models_table(models: list[dict[str, Any]]) -> Table:
    """What `describe` gave, for the terminal."""
    table = Table("model", "size", "where", title="Models", title_justify="left")
    for model in models:
        table.add_row(Text(model["name"]), f"{model['num_bytes'] / 2**20:.1f} MiB", Text(model["path"]))
    return table


def pull_command(model: str, revision: str | None, source: str) -> None:
    """Download a model and say where it lies."""
    from sagellm_core.models import resolve_model

    if source not in ("huggingface", "modelscope"):
        raise InvalidArgumentError(f"unknown source {source!r}; use huggingface or modelscope", field="source")
    path = resolve_model(model, revision=revision, source="modelscope" if source == "modelscope" else "huggingface")
    print(path)
    name = str(path) if source == "modelscope" else model
    print_quietly(f"Run it with: sage-llm run -m {shlex.quote(name)} -p Hello")
