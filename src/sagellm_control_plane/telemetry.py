"""What engines report, taken to those who learn from it: the predictor (step times) and the index of prefix caches."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from sagellm_control_plane.clients.base import EngineClient
from sagellm_control_plane.engines import ManagedEngine
from sagellm_control_plane.predictor import Predictor
from sagellm_control_plane.prefix_index import PrefixIndex
from sagellm_protocol import UnavailableError

if TYPE_CHECKING:
    from sagellm_core.engine_core.report import EngineReport

logger = logging.getLogger(__name__)


class Telemetry:
    """Reads the reports of all engines. Belongs to one event loop."""

    def __init__(self, predictor: Predictor, prefixes: PrefixIndex) -> None:
        self._predictor = predictor
        self._prefixes = prefixes
        self._copies: dict[ManagedEngine, asyncio.Task[None]] = {}  # caches that are being asked for as a whole

    def report(self, engine: ManagedEngine, report: EngineReport) -> None:
        """An engine has reported. Where its cache is not what the index believes, the whole of it is asked for."""
        row = engine.row
        if row is None:
            return  # removed while the report was on its way
        self._predictor.observe_steps(row, report.steps)
        is_in_step = self._prefixes.apply(row, report.epoch, report.cache)
        if not (is_in_step and self._prefixes.check(row, report.digest)) and engine not in self._copies:
            task = asyncio.ensure_future(self._copy(engine.client))
            self._copies[engine] = task
            task.add_done_callback(lambda _: self._copies.pop(engine, None))

    def forget(self, engine: ManagedEngine) -> None:
        """An engine is lost or has left: nothing that is known of its cache holds."""
        task = self._copies.pop(engine, None)
        if task is not None:
            task.cancel()
        if engine.row is not None:
            self._prefixes.reset(engine.row)

    async def _copy(self, client: EngineClient) -> None:
        """Ask for all that is cached; it comes as a report."""
        try:
            await client.cache_snapshot()
        except UnavailableError as error:  # it stops or has died: its life is others' business
            logger.info("%s: no copy of its prefix cache: %s", client.engine_id, error)
