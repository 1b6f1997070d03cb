"""A reverse proxy before an S3 server that spoils answers by a seeded schedule."""

from __future__ import annotations

import random
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.s3_forwarding import ForwardingHandler, serving

FAULTS = ("500", "503", "truncated", "reset_before", "reset_after")
_CODES = {"500": "InternalError", "503": "SlowDown"}


@dataclass
class Schedule:
    """Decides which request is spoiled, and how: a function of the seed and the request's number.

    Attributes:
        fraction: share of spoiled requests.
        seed: of the schedule.
        faults: the kinds to choose from.
        part: of the path of a request, without which it is left alone.
        counts: what has been done so far.
    """

    fraction: float
    seed: int = 0
    faults: tuple[str, ...] = FAULTS
    part: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    _number: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, path: str) -> str:
        """Return the fault of the next request, or ``ok``."""
        if self.part not in path:
            return "ok"
        with self._lock:
            self._number += 1
            draw = random.Random(f"{self.seed}:{self._number}")
            fault = draw.choice(self.faults) if draw.random() < self.fraction else "ok"
            self.counts[fault] += 1
        return fault


@contextmanager
def faulty_proxy(endpoint: str, schedule: Schedule) -> Iterator[str]:
    """Serve a spoiled view of ``endpoint``; yield its own address."""

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(endpoint).netloc

        def do_GET(self) -> None:
            fault = schedule.next(self.path)
            body = self.body()
            if fault == "reset_before":
                return self._reset()
            if fault in _CODES:
                return self.refuse(int(fault), _CODES[fault], "spoiled")
            answer = self.forward(body)
            if fault == "reset_after":
                return self._reset()
            if fault == "truncated" and self.command != "HEAD" and answer.content:
                answer = answer._replace(content=answer.content[: len(answer.content) // 2])
                self.close_connection = True
            self.answer(answer)

        def _reset(self) -> None:
            # Lingering for no time makes the kernel answer with a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):
                self.close_connection = True  # we closed it, or the client did

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    with serving(Handler) as address:
        yield address
