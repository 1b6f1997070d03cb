"""Waiting for another run that does the same stage: its progress is shown as if it were this one's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stages.base import Stage
from stages.lease import Holding, Lease, hold
from stages.runner import StageProgress

logger = logging.getLogger(__name__)


@contextmanager
def held(
    stage: Stage[Any], fingerprint: str, ttl_s: float, on_progress: Callable[[StageProgress], None]
) -> Iterator[Lease | None]:
    """Hold the lease of a stage; None if leases are turned off.

    Args:
        stage: the stage.
        fingerprint: of its result.
        ttl_s: ``cluster.lease_ttl_s``.
        on_progress: shows how far the other run is; may raise to give up waiting.
    """
    if not ttl_s:
        yield None
        return
    with hold(stage.root, stage.name, fingerprint, ttl_s=ttl_s, on_wait=_Waiting(stage.name, on_progress)) as lease:
        yield lease


class _Waiting:
    """Says once for whom a stage waits, and shows that run's progress."""

    def __init__(self, stage: str, on_progress: Callable[[StageProgress], None]) -> None:
        self._stage = stage
        self._on_progress = on_progress
        self._token = 0

    def __call__(self, holding: Holding) -> None:
        if holding.token != self._token:
            self._token = holding.token
            logger.warning("%s: waiting for %s, which does the same", self._stage, holding)
        num_done, num_shards = holding.num_done, holding.num_shards
        self._on_progress(StageProgress(stage=self._stage, num_done=num_done, num_shards=num_shards, is_waiting=True))
