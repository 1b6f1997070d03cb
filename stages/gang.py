"""Stages whose one shard all ranks of a training group process together."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from stages import storage
from stages.base import C, Shard, Stage, record_uri
from stages.lease import fenced
from stages.manifest import ShardRecord

if TYPE_CHECKING:
    from stages.engine import EngineFactory


class GangStage(Stage[C]):
    """What a gang's ranks do around their work.

    A plain call works on one rank in this process, ``cluster/training.py`` calls the same ``process`` on every rank of
    a Ray Train group.
    """

    gang: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False

    def process(
        self,
        shard: Shard,
        output: str,
        make_engine: EngineFactory | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ShardRecord:
        """Do the work and commit it; every rank of a group calls this and gets the record.

        Args:
            shard: the work.
            output: URI of the folder of the stage's shards; checkpoints go to ``<output>/<shard id>/``.
            make_engine: builds the engine on this rank; None for the plain-torch one.
            should_stop: see ``stages.training.train``.
        """
        from stages.engine import TorchEngine, gather_from_ranks, position

        started_at = time.monotonic()
        self.work_on_rank(shard, output, make_engine or TorchEngine, fenced(should_stop, self.fence), started_at)
        gather_from_ranks(None, position()[1])  # the record is there for every rank
        return ShardRecord.from_json(storage.read_json(record_uri(output, shard.id)))

    @abstractmethod
    def work_on_rank(
        self,
        shard: Shard,
        output: str,
        make_engine: EngineFactory,
        should_stop: Callable[[], bool],
        started_at: float,
    ) -> None:
        """Do this rank's part; the first rank commits the record. The arguments are those of ``process``.

        Args:
            started_at: when the work began, by ``time.monotonic``.
        """
