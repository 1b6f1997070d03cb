"""Where shards are processed: the protocol, and the reference that does it in this process.

``cluster/ray_executor.py`` is the other implementation; a test holds them equal.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from stages.base import Progress, Result, Shard, Stage, setting
from stages.errors import ConfigError, InputError, ShardError, StageError, StorageError, UnclipError
from stages.manifest import Manifest, ShardRecord
from stages.redaction import hide_secrets, without_secrets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the work runs and how failures are met. Nothing here changes what is produced."""

    executor: Literal["ray", "local"] = setting("ray", "`ray`, or `local` for this process alone", affects="nothing")
    address: str = setting("local", "`local`, `auto` or the address of a Ray cluster", affects="nothing")
    submit: str | None = setting(
        None,
        "dashboard of a cluster that runs it all as a Ray Job, e.g. http://head:8265; null: none",
        affects="nothing",
    )
    code: Literal["upload", "image"] = setting(
        "upload",
        "what a Ray Job runs: the code that submits it, or what the cluster's image has installed",
        affects="nothing",
    )
    pass_env: tuple[str, ...] = setting(
        (),
        "environment variables that a Ray Job, or workers elsewhere, get from here; the cluster's users can read them",
        affects="nothing",
    )
    num_cpus: int | None = setting(None, "cores a local Ray may use; null: all", affects="nothing")
    num_gpus: int | None = setting(None, "GPUs a local Ray may use; null: all", affects="nothing")
    object_store_gib: float = setting(0.5, "shared memory of a local Ray, GiB", affects="nothing")
    metrics_port: int | None = setting(None, "port of Prometheus metrics during a run; null: none", affects="nothing")
    metrics_host: str = setting("127.0.0.1", "address they are served on; 0.0.0.0: all", affects="nothing")
    max_attempts: int = setting(3, "tries of a shard before it is quarantined", affects="nothing")
    backoff_s: float = setting(2.0, "seconds before the second try of a shard; doubles each time", affects="nothing")
    lease_ttl_s: float = setting(
        60.0,
        "seconds without a sign of life after which another run takes a stage over; 0: no leases",
        affects="nothing",
    )
    wait_for_nodes_s: float | None = setting(
        1800.0,
        "seconds that a stage waits for its first node where none of the cluster could hold a worker; null: for ever",
        affects="nothing",
    )
    max_failed_fraction: float = setting(0.0, "quarantined shards a stage may have, 0 to 1", affects="nothing")

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: {self.max_attempts} is below 1; write 1 for a single try")
        for name, least in (("num_cpus", 1), ("num_gpus", 0), ("object_store_gib", 0), ("backoff_s", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}: {value} is below {least}")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"metrics_port: {self.metrics_port} is no port; write a number from 0 to 65535")
        if self.lease_ttl_s < 0:
            raise ValueError(f"lease_ttl_s: {self.lease_ttl_s} is negative; write 0 to do without leases")
        if self.wait_for_nodes_s is not None and self.wait_for_nodes_s < 0:
            raise ValueError(f"wait_for_nodes_s: {self.wait_for_nodes_s} is negative; write null to wait for ever")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction: {self.max_failed_fraction} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ShardFailure:
    """A shard that failed once.

    Attributes:
        shard: the shard.
        error: what happened, as the pipeline's own error.
        kind: ``retryable``; ``permanent`` (quarantine it); ``fatal`` (every shard would fail: stop the stage).
        details: traceback text for the debug log.
    """

    shard: Shard
    error: UnclipError
    kind: Literal["retryable", "permanent", "fatal"]
    details: str = ""


def failure_of(shard: Shard, error: Exception) -> ShardFailure:
    """Classify an exception raised by ``Stage.process``.

    Called where it was raised: the secrets in it are of that process's environment, and may be no other's.
    """
    details = hide_secrets("".join(traceback.format_exception(error)))
    error = cast(Exception, without_secrets(error))
    if isinstance(error, StorageError) or (isinstance(error, ShardError) and error.retryable):
        return ShardFailure(shard=shard, error=error, kind="retryable", details=details)
    if isinstance(error, ConfigError | InputError | StageError):
        return ShardFailure(shard=shard, error=error, kind="fatal", details=details)
    if isinstance(error, UnclipError):
        return ShardFailure(shard=shard, error=error, kind="permanent", details=details)
    wrapped = ShardError(f"{type(error).__name__}: {error}", retryable=True)
    return ShardFailure(shard=shard, error=wrapped, kind="retryable", details=details)


def stay() -> None:
    """Let the work go on."""


class Executor(Protocol):
    """Something that can process shards."""

    def refuse_impossible(self, stages: Iterable[Stage[Any]]) -> None:
        """Refuse stages whose workers would wait for ever; asked before any of them begins.

        Args:
            stages: those of a run that are still to do; looked at only where any could be refused.

        Raises:
            ConfigError: names what is missing, and the smallest change that would do.
        """
        ...

    def map(
        self,
        stage: Stage[Any],
        shards: Sequence[Shard],
        output: str,
        on_progress: Callable[[Progress], None],
        *,
        on_idle: Callable[[], None] = stay,
    ) -> Iterator[ShardRecord | ShardFailure]:
        """Process shards, each once, and yield what became of them in the order they finish.

        Args:
            stage: copied to every worker.
            shards: the work; an exception in one is yielded as a ``ShardFailure``, not raised.
            output: URI of the folder of the stage's shards.
            on_progress: called on the driver with signs of life from inside the shards.
            on_idle: called on this thread about twice a second by an executor that waits for others; what it raises
                ends the work.
        """
        ...

    def finish(
        self, stage: Stage[Any], records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]
    ) -> Result:
        """Call ``stage.finish`` on a worker.

        Raises:
            UnclipError: what ``finish`` raised.
        """
        ...

    def close(self) -> None:
        """Release all workers; unfinished work is cancelled."""
        ...


class LocalExecutor:
    """The reference: shards one after another in this process."""

    def refuse_impossible(self, stages: Iterable[Stage[Any]]) -> None:
        """Refuse nothing: one process takes whatever there is."""

    def map(
        self,
        stage: Stage[Any],
        shards: Sequence[Shard],
        output: str,
        on_progress: Callable[[Progress], None],
        *,
        on_idle: Callable[[], None] = stay,
    ) -> Iterator[ShardRecord | ShardFailure]:
        """See ``Executor.map``."""
        stage.report = on_progress
        ready = False
        for shard in shards:
            try:
                if not ready:
                    stage.setup()
                    ready = True
                result: ShardRecord | ShardFailure = stage.process(shard, output)
            except Exception as error:
                result = failure_of(shard, error)
            yield result

    def finish(
        self, stage: Stage[Any], records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]
    ) -> Result:
        """See ``Executor.finish``."""
        return stage.finish(records, output, inputs)

    def close(self) -> None:
        """Nothing to release."""
