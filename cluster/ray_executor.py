"""Shards on a Ray cluster: a pool of actors per stage, replaced when they die; gang stages on Ray Train.

It does what ``LocalExecutor`` does, elsewhere: the same outcomes for the same shards. Sample data never passes through
the driver; actors read from and write to the store.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from cluster.board import Board
from cluster.elastic import alive_nodes
from cluster.room import refuse_what_never_fits
from cluster.worker_pool import WorkerPool
from stages.base import Progress, Result, Shard, Stage
from stages.errors import StageError, UnclipError
from stages.executor import ShardFailure, failure_of, stay
from stages.manifest import Manifest, ShardRecord
from stages.units import GIB

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_GRACE_S = 4.0  # for trainings to write a checkpoint when the run is cancelled
_STOP_S = 30.0  # likewise, when that one training is to end
_MAX_DEATHS = 3  # of the workers of a `finish`


class RayExecutor:
    """See ``stages.executor.Executor``; made by ``cluster.connection.connect``. Several threads may map stages at once.

    Args:
        grows: whether nodes may join while a stage is at work.
        wait_for_nodes_s: how long nodes that could hold a stage's workers are waited for, where none does; None: as
            long as it takes.
    """

    def __init__(self, *, grows: bool = False, wait_for_nodes_s: float | None = None) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Beside the driver: it must not go down with a node that the work can do without.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board: Any = ray.remote(Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
        self._board = board.remote()
        self._grows = grows
        self._wait_for_nodes_s = wait_for_nodes_s
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._gangs: set[Future[ShardRecord]] = set()

    def refuse_impossible(self, stages: Iterable[Stage[Any]]) -> None:
        """See ``Executor.refuse_impossible``; a cluster that grows is waited for instead."""
        if not self._grows:
            refuse_what_never_fits(stages, alive_nodes())

    def map(
        self,
        stage: Stage[Any],
        shards: Sequence[Shard],
        output: str,
        on_progress: Callable[[Progress], None],
        *,
        on_idle: Callable[[], None] = stay,
    ) -> Iterator[ShardRecord | ShardFailure]:
        """See ``Executor.map``.

        Raises:
            ConfigError: if no node could ever hold a worker of the stage.
            StageError: if none that could has joined in time.
        """
        key = f"{stage.name}-{uuid.uuid4().hex[:8]}"

        def poll() -> None:
            self._refuse_if_closed(stage)
            self._show_progress(key, on_progress)
            on_idle()

        work = self._map_gang if stage.gang else self._map_pool
        try:
            self.refuse_impossible([stage])
            yield from work(stage, shards, output, key, poll)
        except UnclipError:
            raise
        except (Exception, SystemExit) as error:
            # Ray was shut down under this thread, and says so in many ways.
            self._refuse_if_closed(stage, error)
            raise

    def finish(
        self, stage: Stage[Any], records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]
    ) -> Result:
        """See ``Executor.finish``."""
        import ray

        self._refuse_if_closed(stage)
        if type(stage).finish is Stage.finish:
            return stage.finish(records, output, inputs)
        resources = stage.resources
        # No GPU: what combines the shards has none to compute, and need not wait for one.
        options: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": 0}
        if (num_bytes := stage.finish_bytes(records)) >= GIB:  # less is found anywhere
            options["memory"] = num_bytes
        task: Any = ray.remote(**options, max_retries=_MAX_DEATHS)(_finish)
        try:
            combined = task.remote(stage, records, output, inputs)
            self._await_node(stage, resources.num_cpus, options.get("memory", 0), combined)
            result, error = ray.get(combined)
        except UnclipError:
            raise
        except (Exception, SystemExit) as failure:
            self._refuse_if_closed(stage, failure)
            raise StageError(f"{stage.name}: the worker that combines the shards failed: {failure}") from failure
        if error is not None:
            raise error
        assert isinstance(result, Result)
        return result

    def _await_node(self, stage: Stage[Any], num_cpus: float, num_bytes: int, combined: Any) -> None:
        """Wait until some node has what a ``finish`` asks for; an autoscaler learns of it what is missing.

        Raises:
            StageError: if none ever will, or none has joined in time.
        """
        import ray

        began_at, is_told = time.monotonic(), False
        while True:
            able = [node["Resources"] for node in alive_nodes() if node["Resources"].get("CPU", 0) >= num_cpus]
            most = max((has.get("memory", 0) for has in able), default=0)
            if able and most >= num_bytes:
                return
            said = (
                f"{stage.name}: to decide over all samples a worker needs {num_bytes / GIB:.1f} GiB of memory, and the "
                f"node with the most has {most / GIB:.1f} GiB (Ray's resource 'memory')"
            )
            if not able:
                said = f"{stage.name}: to combine its shards a worker needs {num_cpus:g} CPU, which no node has"
            limit_s = self._wait_for_nodes_s if self._grows else 0.0
            if limit_s is not None and time.monotonic() - began_at >= limit_s:
                ray.cancel(combined)
                raise StageError(f"{said}; run it on a cluster with such a node: what is committed is kept")
            if not is_told:
                logger.warning("%s; waiting for such a node", said)
                is_told = True
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Let trainings write a checkpoint, then release all workers; safe to call twice and from any thread."""
        import ray

        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        if not ray.is_initialized():
            return
        with contextlib.suppress(Exception):  # the cluster may be gone already
            self._board.stop.remote()
            deadline = time.monotonic() + _GRACE_S
            while any(not gang.done() for gang in tuple(self._gangs)) and time.monotonic() < deadline:
                time.sleep(0.05)
        ray.shutdown()

    # ---- ordinary stages ------------------------------------------------------------------------------------------

    def _map_pool(
        self, stage: Stage[Any], shards: Sequence[Shard], output: str, key: str, poll: Callable[[], None]
    ) -> Iterator[ShardRecord | ShardFailure]:
        import ray

        limit_s = self._wait_for_nodes_s
        pool = WorkerPool(stage, shards, output, self._board, key, grows=self._grows, wait_for_nodes_s=limit_s)
        try:
            while pool.busy:
                done, _ = ray.wait(pool.awaited, num_returns=1, timeout=_POLL_S)
                poll()
                pool.tell()
                for ref in done:
                    outcome = pool.take(ref)
                    if outcome is not None:
                        yield outcome
            poll()
        finally:
            pool.close()

    # ---- gang stages ----------------------------------------------------------------------------------------------

    def _map_gang(
        self, stage: Stage[Any], shards: Sequence[Shard], output: str, key: str, poll: Callable[[], None]
    ) -> Iterator[ShardRecord | ShardFailure]:
        from cluster.training import train_gang

        for shard in shards:
            train = partial(train_gang, stage, shard, output, self._board, key, self._wait_for_nodes_s)
            gang = _in_thread(f"gang-{stage.name}", train)
            self._gangs.add(gang)
            try:
                while not gang.done():
                    with contextlib.suppress(TimeoutError):
                        gang.exception(timeout=_POLL_S)
                    poll()
            except BaseException:
                self._stop_gang(gang, key)
                raise
            finally:
                self._gangs.discard(gang)
            error = gang.exception()
            if error is None:
                yield gang.result()
            elif isinstance(error, Exception):
                self._refuse_if_closed(stage, error)
                yield failure_of(shard, error)
            else:
                raise error

    def _stop_gang(self, gang: Future[ShardRecord], key: str) -> None:
        """Let one training write a checkpoint and end; one that hangs is left to its watchdog."""
        with contextlib.suppress(Exception):
            self._board.stop.remote(key)
            gang.exception(timeout=_STOP_S)

    def _show_progress(self, key: str, on_progress: Callable[[Progress], None]) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            progress = ray.get(self._board.take.remote(key), timeout=10 * _POLL_S)
            if progress is not None:
                on_progress(progress)

    def _refuse_if_closed(self, stage: Stage[Any], error: BaseException | None = None) -> None:
        if self._closed.is_set():
            raise StageError(f"{stage.name}: stopped; what is committed is kept, run again to resume") from error


def _in_thread(name: str, function: Callable[[], ShardRecord]) -> Future[ShardRecord]:
    """Call a function in a thread of its own, which does not keep the process alive.

    Ray Train would take over Ctrl-C if it were called in the main thread.
    """
    future: Future[ShardRecord] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _finish(
    stage: Stage[Any], records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]
) -> tuple[Any, Exception | None]:
    """Call ``finish``, on a worker; an error comes back as a value, so that it arrives as it was raised."""
    try:
        return stage.finish(records, output, inputs), None
    except UnclipError as error:
        return None, error
