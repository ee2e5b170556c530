"""Where engines run: in this process, or each in a child process of its own; and how those of one machine share it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from sagellm_backend.cpu.topology import read_topology
from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.run_folder import run_folder, short_folder
from sagellm_core.config import EngineConfig, LLMEngineConfig

Placement = Literal["local", "process"]
MakeEngine = Callable[[LLMEngineConfig], EngineClient]

EngineT = TypeVar("EngineT", bound=EngineConfig)

# Any of these says how much memory an engine takes for its KV cache.
_MEMORY_OPTIONS = frozenset({"kv_cache_memory_bytes", "kv_cache_memory_fraction", "num_kv_blocks"})


def replicated(engines: Sequence[EngineT], replicas: int) -> list[EngineT]:
    """`replicas` engines for each; those with an id of their own get numbers behind it."""
    if replicas == 1:
        return list(engines)
    return [
        engine if engine.engine_id is None else engine.model_copy(update={"engine_id": f"{engine.engine_id}-{number}"})
        for engine in engines
        for number in range(replicas)
    ]


def shared_out(
    engines: Sequence[EngineT], placement: Placement, most: Mapping[str, int] | None = None
) -> list[EngineT]:
    """The engines with a share of this machine each: what one alone would take, divided by how many there may be.

    That is memory for KV caches, and threads where each has a process of its own. What an engine's options say stays.
    `most` are the models whose number of engines changes, with the most that they may have.
    """
    counts = Counter(engine.model for engine in engines)
    count = sum(max(number, (most or {}).get(model, 0)) for model, number in counts.items())
    if count == 1:
        return list(engines)
    alone = LLMEngineConfig.model_fields["kv_cache_memory_fraction"].default
    num_threads = max(1, read_topology().usable_threads // count)
    shared = []
    for engine in engines:
        options: dict[str, Any] = dict(engine.options)
        if _MEMORY_OPTIONS.isdisjoint(options):
            options["kv_cache_memory_fraction"] = alone / count
        if placement == "process":
            options.setdefault("num_threads", num_threads)
        shared.append(engine.model_copy(update={"options": options}))
    return shared


@contextmanager
def engine_maker(
    placement: Placement, local: MakeEngine, state: Path | None = None, *, orphan_timeout_s: float = 60.0
) -> Iterator[MakeEngine]:
    """What makes engines in that place while the body runs; `local` makes those of this process.

    Sockets and logs of children lie in a folder of their own: a temporary one, or, so that they are found again, that
    of the file `state`. Without us they wait `orphan_timeout_s` for a successor.
    """
    if placement == "local":
        yield local
        return
    from sagellm_control_plane.clients.process import ProcessEngineClient

    with ExitStack() as stack:
        if state is not None:
            run_dir = run_folder(state)
        else:
            run_dir = short_folder()
            stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        yield lambda config: ProcessEngineClient(config, run_dir=run_dir, orphan_timeout_s=orphan_timeout_s)
