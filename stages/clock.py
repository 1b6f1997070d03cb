"""The time of day, as records tell it. Decisions never depend on it: clocks of machines differ."""

from __future__ import annotations

import datetime


def utc_now() -> str:
    """Return the present time, ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
