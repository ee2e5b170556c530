"""Dates as text, cheaply: most of those that are written one after the other have the same second."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import lru_cache


def utc_now(num_digits: int) -> str:
    """This moment in UTC as ISO 8601 writes it, without the zone, its seconds with so many digits."""
    seconds, ns = divmod(time.time_ns(), 1_000_000_000)
    return f"{_second(seconds)}.{str(1_000_000_000 + ns)[1 : 1 + num_digits]}"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
