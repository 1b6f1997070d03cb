"""A process whose clocks are wrong, as those of a machine that nobody has set: for programs that tests start.

``set_wrong`` comes before all other imports. Deadlines inside the C library (locks, sockets) stay right; so they are on
a machine with a wrong time of day, since they count from a moment on.
"""

from __future__ import annotations

import datetime
import time
import types

_MONOTONIC_AHEAD_S = 1e7  # on every machine it begins somewhere else


def set_wrong(ahead_s: float) -> None:
    """Let the time of day be wrong for the rest of this process, and monotonic time begin somewhere else.

    Args:
        ahead_s: by how much; negative: behind.
    """
    true_time, true_monotonic = time.time, time.monotonic
    time.time = lambda: true_time() + ahead_s
    time.time_ns = lambda: int(time.time() * 1e9)
    time.monotonic = lambda: true_monotonic() + _MONOTONIC_AHEAD_S

    from stages import clock

    class WrongDatetime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> WrongDatetime:
            return cls.fromtimestamp(time.time(), tz)

    # Not in the module datetime itself: compiled extensions count on the size of its class.
    clock.datetime = types.SimpleNamespace(datetime=WrongDatetime, UTC=datetime.UTC)  # type: ignore[assignment]
