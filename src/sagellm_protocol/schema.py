"""JSON Schema of the public types: ``python -m sagellm_protocol.schema [--out DIR] [--type NAME]``.

One self-contained draft 2020-12 document a type, describing what is *accepted* (so ``stop`` may be a string, a list or
null). Without ``--out`` the documents go to standard output as one object, by type name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import sagellm_protocol
from sagellm_protocol import PROTOCOL_VERSION, NotFoundError, SageLLMError, openai
from sagellm_protocol.model import EchoedModel, EdgeModel, ProtocolModel
from sagellm_protocol.stream import STREAM_EVENT_ADAPTER

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BASES = (ProtocolModel, EdgeModel, EchoedModel)


def schema_types() -> tuple[str, ...]:
    """Return the names of the types that have a schema, sorted."""
    return tuple(sorted([*_models(), "StreamEvent"]))


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema of the public type ``name``.

    Raises:
        NotFoundError: if there is no such type; lists the known ones.
    """
    models = _models()
    if name == "StreamEvent":
        schema = STREAM_EVENT_ADAPTER.json_schema()
    elif name in models:
        schema = models[name].model_json_schema()
    else:
        raise NotFoundError(f"no public type {name!r}; use one of {', '.join(schema_types())}", field="type")
    return {"$schema": DIALECT, "title": name, "x-protocol-version": PROTOCOL_VERSION, **schema}


def write_schemas(folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write one ``<name>.json`` a type into ``folder`` (made if missing); return the files, in order of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in schema_types() if names is None else names:
        path = folder / f"{name}.json"
        path.write_text(_as_text(json_schema(name)), encoding="utf-8")
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sagellm_protocol.schema", description="Export JSON Schema.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write one <type>.json each into this folder")
    parser.add_argument("--type", action="append", dest="names", metavar="NAME", help="only this type (repeatable)")
    options = parser.parse_args(arguments)
    try:
        names = options.names or schema_types()
        if options.out is None:
            sys.stdout.write(_as_text({name: json_schema(name) for name in names}))
        else:
            print(f"{len(write_schemas(options.out, names))} schemas written to {options.out}")
    except (SageLLMError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _models() -> dict[str, type[BaseModel]]:
    """Return the public model classes of the protocol and of its OpenAI types, by name."""
    exported = [getattr(module, name) for module in (sagellm_protocol, openai) for name in module.__all__]
    kinds = [item for item in exported if isinstance(item, type) and issubclass(item, BaseModel)]
    return {kind.__name__: kind for kind in kinds if kind not in _BASES}


def _as_text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, sort_keys=False) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
