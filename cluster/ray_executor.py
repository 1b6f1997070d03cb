"""Shards on a Ray cluster: a pool of actors per stage, replaced when they die; gang stages on Ray Train.

It does what ``LocalExecutor`` does, elsewhere: the same outcomes for the same shards. Sample data never passes through
the driver; actors read from and write to the store.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.board import Board, BoardLink
from cluster.draining import DrainWatch
from cluster.elastic import alive_nodes
from cluster.room import could_hold, not_in_time, refuse_what_never_fits
from stages.base import Progress, Result, Shard, Stage
from stages.errors import ConfigError, ShardError, StageError, UnclipError, first_line
from stages.executor import ClusterConfig, ShardFailure, failure_of, stay
from stages.manifest import Manifest, ShardRecord
from stages.units import GIB

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_FAILURES_APART_S = 5.0  # failed starts within this time have one cause
_MAX_DEATHS = 3  # of the workers of one shard, or at the start of a worker
_GRACE_S = 4.0  # for trainings to write a checkpoint when the run is cancelled
_STOP_S = 30.0  # likewise, when that one training is to end
_MAX_STARTS = 3
_ANSWER_TIMEOUT_S = 10.0
# Workers asked for beyond the room there is, so that an autoscaler brings nodes: as many as work, within these.
_MIN_SPARES, _MAX_SPARES = 4, 64
_SAY_WAITING_S = 30.0
_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
# Quiet, private, and patient: a training group may wait for its turn. A thread that still asks a closed executor's
# cluster for something must fail: by itself Ray would start another cluster to answer it.
_ENVIRONMENT = {
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Not a fault but how we work: groups that wait their turn have processes too.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",
}
# An actor per training, seconds of imports, that waits for notices which only clusters of spot machines get.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# What workers on another machine need to know of this one; credentials belong to the machines themselves.
_FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION")
_PACKAGES = ("stages", "cluster", "unclip_models")


def connect(cluster: ClusterConfig) -> RayExecutor:
    """Start Ray on this machine, or join a cluster; call it in the main thread, with whose life Ray's processes end.

    Raises:
        ConfigError: if the cluster does not answer.
        StageError: if Ray does not start here.
    """
    from cluster.training import START_TIMEOUT_S

    environment = _ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S)}
    for name, value in (environment | (_LOCAL_ENVIRONMENT if cluster.address == "local" else {})).items():
        os.environ.setdefault(name, value)
    if cluster.address == "local":
        _start(cluster)
    else:
        _join(cluster)
    return RayExecutor(grows=cluster.address != "local", wait_for_nodes_s=cluster.wait_for_nodes_s)


def _start(cluster: ClusterConfig) -> None:
    """Start Ray on this machine; it gives itself 30 s, which a busy machine can miss once."""
    import ray

    for attempt in range(1, _MAX_STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cluster.num_cpus,
                num_gpus=cluster.num_gpus,
                object_store_memory=int(cluster.object_store_gib * GIB),
                include_dashboard=False,
                **_QUIET,
            )
            return
        except Exception as error:  # a bare Exception is what Ray raises when it was too slow
            ray.shutdown()
            if attempt == _MAX_STARTS or isinstance(error, ValueError):
                raise StageError(
                    f"cluster: Ray does not start on this machine: {first_line(error)}; free some memory and cores "
                    "and run again, or set cluster.executor: local"
                ) from error
            logger.warning("Ray did not start (%s); trying again", first_line(error))


def _join(cluster: ClusterConfig) -> None:
    import ray

    try:
        _refuse_dead(cluster.address)
        _refuse_outsiders(cluster.address)
        # A driver that is itself a Ray Job has its code and environment from there, and its workers inherit them.
        runtime_env = None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else _runtime_env()
        ray.init(address=cluster.address, runtime_env=runtime_env, **_QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.address: '{cluster.address}': {first_line(error)}; start that cluster, correct the address, or "
            "write `local`"
        ) from error


def _refuse_dead(address: str) -> None:
    """Make sure that somebody listens at an address: Ray would ask for more than a minute before it says so.

    Raises:
        OSError: if nobody does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():  # `auto` is Ray's to look for
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_TIMEOUT_S).close()


def _refuse_outsiders(address: str) -> None:
    """Make sure that this machine is a node of the cluster at ``HOST:PORT``.

    A driver works through Ray's process on its own machine; where there is none, Ray ends the whole Python.

    Raises:
        ConfigError: if it is none.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled

    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdigit()):
        return
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=_ANSWER_TIMEOUT_S).values()
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"no head of a Ray cluster answers there: {first_line(error)}") from error
    if not any(node.state == 0 and Path(node.raylet_socket_name).exists() for node in nodes):
        raise ConfigError(
            f"cluster.address: '{address}': this machine is not a node of that cluster, so it cannot drive it; hand "
            f"the run over with cluster.submit: http://{host}:8265, or drive from here with cluster.address: "
            f"ray://{host}:10001"
        )


def _runtime_env() -> dict[str, Any]:
    """Describe what a remote worker needs of this machine: the code, and where the store is."""
    top = Path(__file__).parents[1]
    forwarded = {name: os.environ[name] for name in _FORWARDED if name in os.environ}
    return {
        "py_modules": [str(top / package) for package in _PACKAGES],
        "env_vars": {**forwarded, "RAY_TRAIN_METRICS_ENABLED": "0"},
    }


class RayExecutor:
    """See ``stages.executor.Executor``; made by ``connect``. Several threads may map stages at once.

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

    def refuse_impossible(self, stages: Sequence[Stage[Any]]) -> None:
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
        options: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
        if (num_bytes := stage.finish_bytes(records)) >= GIB:  # less is found anywhere
            options["memory"] = num_bytes
        task: Any = ray.remote(**options, max_retries=_MAX_DEATHS)(_finish)
        try:
            self._await_memory(stage, options.get("memory", 0), combined := task.remote(stage, records, output, inputs))
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

    def _await_memory(self, stage: Stage[Any], num_bytes: int, combined: Any) -> None:
        """Wait until some node has the memory that a ``finish`` asks for; an autoscaler learns of it what is missing.

        Raises:
            StageError: if none ever will, or none has joined in time.
        """
        import ray

        began_at, is_told = time.monotonic(), False
        while (most := max((node["Resources"].get("memory", 0) for node in alive_nodes()), default=0)) < num_bytes:
            said = (
                f"{stage.name}: to decide over all samples a worker needs {num_bytes / GIB:.1f} GiB of memory, and the "
                f"node with the most has {most / GIB:.1f} GiB (Ray's resource 'memory')"
            )
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
        pool = _Pool(stage, shards, output, self._board, key, grows=self._grows, wait_for_nodes_s=limit_s)
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


class _Pool:
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


def _pool_size(stage: Stage[Any], num_shards: int, available: Mapping[str, float]) -> int:
    """Return how many workers fit into the cluster, at most one per shard, at least one."""
    resources = stage.resources
    limits = [num_shards, resources.max_workers or num_shards]
    if resources.num_cpus > 0:
        limits.append(math.floor(available.get("CPU", 0.0) / resources.num_cpus))
    if resources.num_gpus > 0:
        limits.append(math.floor(available.get("GPU", 0.0) / resources.num_gpus))
    return max(min(1, num_shards), min(limits))


def _finish(
    stage: Stage[Any], records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]
) -> tuple[Any, Exception | None]:
    """Call ``finish``, on a worker; an error comes back as a value, so that it arrives as it was raised."""
    try:
        return stage.finish(records, output, inputs), None
    except UnclipError as error:
        return None, error
