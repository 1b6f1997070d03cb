"""The contract of a stage: what it is called, what it needs, how one shard of it is done.

A stage never knows where it runs. It plans shards from the manifests of earlier stages (pure), loads heavy things
once per worker (``setup``), turns one shard into files and a record (``process``; atomic, safe to repeat) and
combines what the shards made (``finish``). An executor (``stages/executor.py``, ``cluster/ray_executor.py``) decides
where this happens.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from stages import storage
from stages.manifest import File, Manifest, ShardRecord, digest_of

C = TypeVar("C")
Affects = Literal["shard", "stage", "nothing"]
Placement = Literal["pack", "spread", "strict_pack", "strict_spread"]


def setting(
    default: Any = dataclasses.MISSING, help: str = "", *, affects: Affects = "shard", factory: Any = None
) -> Any:
    """Declare one setting of a frozen config dataclass.

    Args:
        default: its default value; none makes the setting required.
        help: one line for the reference of settings, with the unit.
        affects: what changes when the setting changes. ``shard``: the content of every shard. ``stage``: only what
            ``finish`` makes, so the shards are kept. ``nothing``: how fast or where the work runs.
        factory: makes the default where it is mutable or a nested config.
    """
    metadata = {"help": help, "affects": affects}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse_below(config: Any, least: float, *names: str) -> None:
    """Refuse settings that are below the least value they may have.

    Raises:
        ValueError: names the setting, its value and the remedy.
    """
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}: {getattr(config, name)} is below {least}; write {least} or more")


def identity_of(config: Any, scopes: Sequence[Affects]) -> Any:
    """Return the settings that affect one of ``scopes``, as plain JSON values; nested configs inherit their field's."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            f.name: identity_of(getattr(config, f.name), scopes)
            for f in dataclasses.fields(config)
            if f.metadata.get("affects", "shard") in scopes
        }
    if isinstance(config, Mapping):
        return {str(key): identity_of(value, scopes) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [identity_of(value, scopes) for value in config]
    return config


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker of a stage needs.

    Attributes:
        num_cpus: CPU cores (fractions allowed).
        num_gpus: GPUs (fractions allowed).
        max_workers: how many shards may be worked on at once; None: as many as fit.
        num_ranks: for gang stages, how many processes train together; 0 for ordinary stages.
        custom: further resources of the cluster.
        placement: how the ranks of a gang are laid over the nodes.
        node_labels: of the nodes that a gang may run on.
        accelerator_type: of their GPUs; None: any.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_workers: int | None = None
    num_ranks: int = 0
    custom: Mapping[str, float] = field(default_factory=dict)
    placement: Placement = "pack"
    node_labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_type: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One unit of work.

    Attributes:
        id: identity of the work and name of its output: 16 hex digits over stage, version, settings, inputs, params.
        index: position in the plan (for people; not part of the identity).
        inputs: files it reads, by role.
        params: plain values that define it, such as a row range.
    """

    id: str
    index: int
    inputs: Mapping[str, File] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What ``finish`` made of a whole stage.

    Attributes:
        records: the final shard records, in plan order (a stage may replace the ones ``process`` returned).
        files: stage-wide files by role.
        metrics: plain numbers and short texts.
    """

    records: Sequence[ShardRecord]
    files: Mapping[str, File] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A sign of life from inside a shard, for the progress bars.

    Attributes:
        done: units finished.
        total: units in all.
        unit: what is counted: ``shards``, ``images``, ``steps``.
        numbers: further live numbers, such as ``{"loss": 0.12}``.
    """

    done: int
    total: int
    unit: str
    numbers: Mapping[str, float] = field(default_factory=dict)


def _ignore(progress: Progress) -> None:
    """Drop progress where nobody watches."""


def _no_fence() -> None:
    """Let pass where a run has the store for itself."""


class Stage(ABC, Generic[C]):
    """One step of the pipeline; see the module's docstring.

    Attributes:
        name: one word, the same in file, class, config section, output folder and command line.
        version: raised when the output changes for the same settings.
        repeatable: whether a shard that is done twice, on any machine, has equal bytes. If not, a run whose stage was
            taken over meanwhile publishes no shard any more: it would spoil what its successor has recorded.
        upstream: the stages whose manifests it reads.
        counts: the upstream stage whose kept samples are exactly the ones that come in; none if it is not so simple.
            The runner holds every run to it (``stages/balance.py``).
        uses_seed: whether the config's global seed changes the output.
        gang: whether all ranks of a training group process one shard together (see ``stages/gang.py``).
        report: called by ``process`` with live ``Progress``; set by the executor on the worker.
        fence: raises if another run has taken the stage over; set by the runner, asked by work that takes long.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    repeatable: ClassVar[bool] = True
    counts: ClassVar[str | None] = None
    uses_seed: ClassVar[bool] = False
    gang: ClassVar[bool] = False

    def __init__(self, config: C, *, root: str, seed: int = 0) -> None:
        self.config = config
        self.root = root.rstrip("/")
        self.seed = seed
        self.report: Callable[[Progress], None] = _ignore
        self.fence: Callable[[], None] = _no_fence

    # ---- identity -------------------------------------------------------------------------------------------------

    @property
    def upstream(self) -> tuple[str, ...]:
        """Names of the stages whose manifests ``plan`` reads."""
        return ()

    @property
    def resources(self) -> Resources:
        """What one worker needs."""
        return Resources()

    def external(self) -> Any:
        """Identify inputs outside the store (URL lists, weights) by content, as plain JSON values.

        Raises:
            InputError: if one of them is missing or unreadable.
        """
        return None

    def named_results(self) -> Sequence[tuple[str, str]]:
        """Return stage and fingerprint of the results of other runs in this store that the settings name."""
        return ()

    def fingerprint(self, inputs: Mapping[str, str]) -> str:
        """Name the stage's output: same question, same folder.

        Args:
            inputs: fingerprint of every upstream stage.

        Returns:
            16 hex digits.
        """
        return digest_of(
            {
                "work": self._work(("shard", "stage")),
                "external": self.external(),
                "inputs": {name: inputs[name] for name in self.upstream},
            }
        )[:16]

    def shard(self, index: int, *, inputs: Mapping[str, File] | None = None, **params: Any) -> Shard:
        """Build a shard whose id is a function of the work alone: stage, version, settings, input contents, params."""
        inputs = dict(inputs or {})
        contents = {role: file.sha256 for role, file in inputs.items()}
        identity = digest_of({"work": self._shard_work, "inputs": contents, "params": params})
        return Shard(id=identity[:16], index=index, inputs=inputs, params=params)

    @functools.cached_property
    def _shard_work(self) -> dict[str, Any]:
        return self._work(("shard",))

    def _work(self, scopes: Sequence[Affects]) -> dict[str, Any]:
        seed = self.seed if self.uses_seed else None
        return {"stage": self.name, "version": self.version, "seed": seed, "config": identity_of(self.config, scopes)}

    # ---- the work -------------------------------------------------------------------------------------------------

    @abstractmethod
    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """List the shards (pure: reads manifests, writes nothing).

        Raises:
            InputError: if there is nothing to do where there should be (an empty dataset).
        """

    def service(self, inputs: Mapping[str, Manifest]) -> AbstractContextManager[None]:
        """Give what must be up beside the driver while shards are processed, such as a server of procedural data."""
        return nullcontext()

    def setup(self) -> None:
        """Load models and the like; called once on every worker before its first shard, never on the driver."""

    @abstractmethod
    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Do one shard: publish its files below ``output``, its record last. Doing it twice is harmless.

        Args:
            shard: from ``plan``.
            output: URI of the folder of this stage's shards.
        """

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Combine the shards of the whole stage; called once after the last shard, on a worker.

        Args:
            records: of all shards that succeeded, in plan order.
            output: URI of the folder of this stage's result, ``<root>/<stage>/<fingerprint>``.
            inputs: the upstream manifests.
        """
        return Result(records=records)

    def finish_bytes(self, records: Sequence[ShardRecord]) -> int:
        """Estimate the memory that ``finish`` holds, bytes; 0 where any worker has it."""
        return 0

    # ---- tools for subclasses -------------------------------------------------------------------------------------

    def uri(self, file: File) -> str:
        """Resolve a recorded file against the store."""
        return storage.join(self.root, file.path)

    def publish(self, uri: str, content: bytes | Path) -> File:
        """Write one file of this store atomically and return its record."""
        written = storage.write_bytes(uri, content) if isinstance(content, bytes) else storage.upload(content, uri)
        relative = uri.removeprefix(self.root).lstrip("/")
        return File(path=relative, sha256=written.sha256, num_bytes=written.num_bytes)

    def commit(
        self,
        shard: Shard,
        output: str,
        files: Mapping[str, tuple[str, bytes | Path] | File],
        *,
        started_at: float,
        num_in: int = 0,
        num_kept: int = 0,
        dropped: Mapping[str, int] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> ShardRecord:
        """Publish the files of a shard, then its record.

        Args:
            shard: the shard.
            output: URI of the folder of this stage's shards.
            files: role -> (extension, content) to store as ``<output>/<shard id>.<extension>``, or a file published
                before.
            started_at: ``time.monotonic()`` at the start of the work.
            num_in: samples in.
            num_kept: samples out.
            dropped: reason -> samples.
            metrics: plain numbers and short texts to keep.
        """
        if not self.repeatable:
            self.fence()
        published = {
            role: item
            if isinstance(item, File)
            else self.publish(storage.join(output, f"{shard.id}.{item[0]}"), item[1])
            for role, item in files.items()
        }
        record = ShardRecord(
            shard_id=shard.id,
            files=published,
            inputs=shard.inputs,
            num_in=num_in,
            num_kept=num_kept,
            dropped=dict(sorted((dropped or {}).items())),
            metrics=metrics or {},
            wall_time_s=round(time.monotonic() - started_at, 3),
        )
        written = storage.write_json(record_uri(output, shard.id), record.to_json())
        return dataclasses.replace(record, version=written.version)


def record_uri(output: str, shard_id: str) -> str:
    """Return where the record of a shard is stored."""
    return storage.join(output, f"{shard_id}.json")
