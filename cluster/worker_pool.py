"""The actors of one stage: each does one shard at a time, a dead one is replaced, a growing cluster gets more."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.board import BoardLink
from cluster.draining import DrainWatch
from cluster.elastic import alive_nodes
from cluster.room import could_hold, not_in_time
from stages.base import Shard, Stage
from stages.errors import ShardError, StageError, first_line
from stages.executor import ShardFailure, failure_of
from stages.manifest import ShardRecord

logger = logging.getLogger(__name__)

_FAILURES_APART_S = 5.0  # failed starts within this time have one cause
_MAX_DEATHS = 3  # of the workers of one shard, or at the start of a worker
# Workers asked for beyond the room there is, so that an autoscaler brings nodes: as many as work, within these.
_MIN_SPARES, _MAX_SPARES = 4, 64
_SAY_WAITING_S = 30.0


class _Worker:
    """One process of a pool: a copy of the stage, set up before its first shard. Becomes an actor."""

    def __init__(self, stage: Stage[Any], board: Any, key: str) -> None:
        self._stage = stage
        self._is_set_up = False
        stage.report = BoardLink(board, key).report

    def ready(self) -> str:
        """Answer once the process is up, with the id of its node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def process(self, shard: Shard, output: str) -> ShardRecord | ShardFailure:
        """Do a shard; what goes wrong comes back as a value."""
        try:
            if not self._is_set_up:
                self._stage.setup()
                self._is_set_up = True
            return self._stage.process(shard, output)
        except Exception as error:
            return failure_of(shard, error)


@dataclass
class _Running:
    """A shard that an actor is doing."""

    actor: Any
    shard: Shard
    node: str


class WorkerPool:
    """The actors of one stage; each does one shard at a time, and a dead one is replaced.

    Where nodes may join, more actors are asked for than there is room for: an autoscaler sees by them what is needed,
    and they start on the nodes that come.
    """

    def __init__(
        self,
        stage: Stage[Any],
        shards: Sequence[Shard],
        output: str,
        board: Any,
        key: str,
        *,
        grows: bool,
        wait_for_nodes_s: float | None,
    ) -> None:
        import ray

        self._stage = stage
        self._resources = stage.resources
        self._name = stage.name
        self._output = output
        self._waiting = deque(shards)
        self._deaths: dict[str, int] = {}
        self._num_failed_starts, self._failed_at = 0, -_FAILURES_APART_S
        self._drains = DrainWatch()
        self._starting: dict[Any, Any] = {}
        self._running: dict[Any, _Running] = {}
        num_cpus, num_gpus = self._resources.num_cpus, self._resources.num_gpus
        decorate = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0)
        self._actor_class: Any = decorate(_Worker)
        self._arguments = (ray.put(stage), board, key)
        self._grows = grows
        self._num_fitting = _pool_size(stage, len(shards), ray.cluster_resources())
        self._num_most = min(len(shards), self._resources.max_workers or len(shards)) if grows else self._num_fitting
        self._began_at = self._started_at = time.monotonic()
        self._wait_for_nodes_s = wait_for_nodes_s
        self._is_told = self._has_started = False
        self._adjust()

    @property
    def busy(self) -> bool:
        """Whether any shard is waiting or being done."""
        return bool(self._waiting or self._running)

    @property
    def awaited(self) -> list[Any]:
        """What the actors owe an answer to; new ones first, or quick shards would keep them from their first."""
        return [*self._starting, *self._running]

    def take(self, ref: Any) -> ShardRecord | ShardFailure | None:
        """Take an answer, and give its actor the next shard; return the outcome if it was one."""
        outcome = None
        if ref in self._starting:
            self._take_start(ref)
        else:
            outcome = self._take_outcome(ref)
        self._adjust()
        return outcome

    def tell(self) -> None:
        """Say once if workers find no room for a while.

        Raises:
            StageError: if none ever has, no node could hold one, and none that could has joined in time.
        """
        self._refuse_to_wait_longer()
        if self._is_told or not self._starting or time.monotonic() - self._started_at < _SAY_WAITING_S:
            return
        self._is_told = True
        needs = f"{self._resources.num_cpus:g} cores and {self._resources.num_gpus:g} GPUs"
        if self._running:
            logger.info(
                "%s: %d workers are busy and %d shards wait; more workers, of %s each, start when a node joins",
                *(self._name, len(self._running), len(self._waiting), needs),
            )
        else:
            logger.warning(
                "%s: no worker has started for %.0f s; %d shards wait for a node with %s to spare",
                *(self._name, _SAY_WAITING_S, len(self._waiting), needs),
            )

    def _refuse_to_wait_longer(self) -> None:
        limit_s = self._wait_for_nodes_s
        if limit_s is None or self._has_started or time.monotonic() - self._began_at <= limit_s:
            return
        if not could_hold(nodes := alive_nodes(), self._stage):
            raise not_in_time(self._stage, nodes, limit_s)

    def close(self) -> None:
        """End all actors."""
        import ray

        for actor in (*self._starting.values(), *(running.actor for running in self._running.values())):
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self._starting.clear()
        self._running.clear()

    def _adjust(self) -> None:
        """Ask for as many workers as there should be, and for none that would find no shard."""
        import ray

        num_working = len(self._running)
        num_useful = min(len(self._waiting), self._num_most - num_working)
        num_wanted = self._num_fitting - num_working
        if self._grows:
            num_wanted = max(num_wanted, min(max(num_working, _MIN_SPARES), _MAX_SPARES))
        while len(self._starting) < min(num_useful, num_wanted):
            actor = self._actor_class.remote(*self._arguments)
            self._starting[actor.ready.remote()] = actor
        while len(self._starting) > max(num_useful, 0):
            ray.kill(self._starting.popitem()[1])  # the youngest: it has come least far

    def _take_start(self, ref: Any) -> None:
        import ray

        actor = self._starting.pop(ref)
        try:
            node = ray.get(ref)
        except ray.exceptions.RayError as error:
            with contextlib.suppress(Exception):
                ray.kill(actor)
            self._note_failed_start(error)
            if self._num_failed_starts >= _MAX_DEATHS:
                raise StageError(f"{self._name}: workers die as they start: {first_line(error)}") from error
            return
        self._num_failed_starts = 0
        self._started_at, self._has_started = time.monotonic(), True
        self._next(actor, node)

    def _note_failed_start(self, error: Exception) -> None:
        """Count it, unless it belongs to the last one: with a machine goes whatever is sent there until Ray knows."""
        if getattr(error, "preempted", False) or time.monotonic() - self._failed_at < _FAILURES_APART_S:
            return
        self._failed_at = time.monotonic()
        self._num_failed_starts += 1

    def _take_outcome(self, ref: Any) -> ShardRecord | ShardFailure | None:
        import ray

        running = self._running.pop(ref)
        outcome: ShardRecord | ShardFailure
        try:
            outcome = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # the outcome could not be carried over
            outcome = failure_of(running.shard, ShardError(f"{type(error).__name__}: {error}", retryable=True))
        except ray.exceptions.RayError as error:
            return self._bury(running, error)
        self._next(running.actor, running.node)
        return outcome

    def _next(self, actor: Any, node: str) -> None:
        """Give an actor a shard; one that gets none gives its resources back."""
        import ray

        # A node that is going away gets no more work; Ray starts the successor elsewhere.
        if not self._waiting or node in self._drains.nodes():
            ray.kill(actor)
            return
        shard = self._waiting.popleft()
        self._running[actor.process.remote(shard, self._output)] = _Running(actor, shard, node)

    def _bury(self, running: _Running, error: Exception) -> ShardFailure | None:
        """Let a dead actor's shard be done again, or give it up when it keeps killing workers."""
        import ray

        with contextlib.suppress(Exception):
            ray.kill(running.actor)  # one that merely cannot be reached must not do the shard beside its successor
        shard = running.shard
        is_preempted = running.node in self._drains.nodes() or getattr(error, "preempted", False)
        self._deaths[shard.id] = self._deaths.get(shard.id, 0) + (not is_preempted)
        if self._deaths[shard.id] < _MAX_DEATHS:
            logger.warning("%s shard %d (%s): its worker died; doing it again", self._name, shard.index, shard.id)
            self._waiting.append(shard)
            return None
        message = f"its worker died {_MAX_DEATHS} times: {first_line(error)}; it may need more memory than there is"
        return failure_of(shard, ShardError(message, retryable=True))


def _pool_size(stage: Stage[Any], num_shards: int, available: Mapping[str, float]) -> int:
    """Return how many workers fit into the cluster, at most one per shard, at least one."""
    resources = stage.resources
    limits = [num_shards, resources.max_workers or num_shards]
    if resources.num_cpus > 0:
        limits.append(math.floor(available.get("CPU", 0.0) / resources.num_cpus))
    if resources.num_gpus > 0:
        limits.append(math.floor(available.get("GPU", 0.0) / resources.num_gpus))
    return max(min(1, num_shards), min(limits))
