"""Checkpoints of a training: written like any other output, the record last.

Layout::

    <folder>/checkpoints/step-000123/rank-0000.safetensors     every rank writes its own files
    <folder>/checkpoints/step-000123/metrics.jsonl             the metrics up to this step
    <folder>/checkpoints/step-000123/guard.json                what the next steps are judged by (step_guard.py)
    <folder>/checkpoints/step-000123/checkpoint.json           step, files, checksums; its presence means whole
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stages import storage
from stages.engine import Engine, files_to_load
from stages.errors import IntegrityError, NotFoundError, StorageError, UnclipError
from stages.metrics import METRICS_NAME
from stages.sharded_state import assemble
from stages.state_file import RANK_FILE, StateFile, Stretch
from stages.step_guard import GUARD_NAME
from stages.storage import Written

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_IO_THREADS = 16
RECORD_NAME = "checkpoint.json"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The record of a checkpoint.

    Attributes:
        step: optimizer steps done.
        layout: ``Engine.layout`` of the engine that wrote it.
        world_size: ranks that wrote it.
        files: name -> checksum and size.
    """

    step: int
    layout: str
    world_size: int
    files: Mapping[str, Written]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def read(cls, uri: str) -> Checkpoint:
        """Read a record.

        Raises:
            StorageError: if it is missing or cannot be read.
            IntegrityError: if it is no record of this format.
        """
        content = storage.read_bytes(uri)
        try:
            value = json.loads(content)
            if value.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"not of format {FORMAT_VERSION}")
            value["files"] = {name: Written(**written) for name, written in value["files"].items()}
            return cls(**value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(f"{uri}: not a checkpoint record ({error})") from error


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on: the step, the metric lines up to it, and the state of the step guard, if kept."""

    step: int
    metrics: bytes
    guard: bytes


@dataclass(frozen=True)
class _Unusable:
    """Why a rank cannot use a checkpoint; a damaged one stays so, another may be readable in a while."""

    why: str
    is_damaged: bool

    @classmethod
    def of(cls, error: UnclipError) -> _Unusable:
        """Say what an error means for a checkpoint."""
        return cls(f"{error}", isinstance(error, IntegrityError | NotFoundError))


@dataclass(frozen=True)
class _Seen:
    """What the first rank has seen of a checkpoint: the record, and what is in which file if all may be needed."""

    record: Checkpoint
    heads: Mapping[str, Sequence[Stretch]]


class CheckpointFolder:
    """All checkpoints of one training.

    Args:
        folder: URI of the training's folder.
        keep_last: how many checkpoints to keep.
        keep_every: steps whose multiples are kept for good.
    """

    def __init__(self, folder: str, keep_last: int, keep_every: int | None = None) -> None:
        self._uri = storage.join(folder, "checkpoints")
        self._keep_last = keep_last
        self._keep_every = keep_every
        self.spared_step: int | None = None  # kept too: the best step so far of a training that may stop early

    def begin(self, engine: Engine, step: int) -> str | None:
        """Make room for a checkpoint (collective).

        Args:
            engine: of any rank.
            step: optimizer steps done.

        Returns:
            On every rank: what went wrong, or None.
        """
        return self._forget_records(engine, [step])  # of a damaged one that is done again

    def commit(
        self, engine: Engine, step: int, files: Mapping[str, Written], error: Exception | None = None
    ) -> str | None:
        """Make a checkpoint count, if no rank failed (collective), then delete the oldest ones.

        Args:
            engine: whose state it holds.
            step: optimizer steps done.
            files: those that this rank has put there.
            error: why this rank could not.

        Returns:
            On every rank: what went wrong on some rank, or None.
        """
        parts = engine.gather((dict(files), None if error is None else f"{error}" or type(error).__name__))
        failed = next((why for _, why in parts if why is not None), None)
        if failed is None and engine.rank == 0:
            every = {name: written for part, _ in parts for name, written in part.items()}
            record = Checkpoint(step=step, layout=engine.layout, world_size=engine.world_size, files=every)
            try:
                storage.write_json(storage.join(self.uri_of(step), RECORD_NAME), record.to_json())
            except StorageError as problem:
                failed = f"{problem}"
            else:
                with contextlib.suppress(StorageError):  # a leftover costs space only; the next save tries again
                    self._retain()
        return engine.gather(failed)[0]  # nobody leaves before the checkpoint counts

    def resume(self, engine: Engine) -> Resumed | None:
        """Load the newest whole checkpoint into the engine (collective).

        A checkpoint that any rank finds damaged is passed over by all, with a warning, and counts no more.

        Returns:
            None if there are no checkpoints.

        Raises:
            StorageError: on every rank, if one of them cannot read a checkpoint that is not known to be damaged: to
                train from an earlier one would throw steps away for a moment's trouble.
            IntegrityError: if there are checkpoints, and all are damaged.
        """
        steps = engine.gather(self.steps())[0]
        for number, step in enumerate(steps):
            seen = engine.gather(self._look(engine, step) if engine.rank == 0 else None)[0]
            assert seen is not None
            loaded = seen if isinstance(seen, _Unusable) else self._try_load(engine, seen)
            found = engine.gather(loaded if isinstance(loaded, _Unusable) else None)
            problems = sorted((problem for problem in found if problem), key=lambda problem: problem.is_damaged)
            if not problems:
                assert isinstance(loaded, Resumed)
                engine.publish()
                # Among the newest ones they would push out whole ones.
                if (problem := self._forget_records(engine, steps[:number])) is not None:
                    raise StorageError(problem)
                return loaded
            if not problems[0].is_damaged:
                raise StorageError(
                    f"the checkpoint of step {step} cannot be read at present ({problems[0].why}); once it can, run "
                    "again to go on from there"
                )
            logger.warning("checkpoint of step %d is passed over: %s", step, problems[0].why)
        if steps:
            raise IntegrityError(
                f"{self._uri}: all {len(steps)} checkpoints are damaged, the newest of step {steps[0]}; put them back, "
                "or run with --force to train from the beginning"
            )
        return None

    def _forget_records(self, engine: Engine, steps: Sequence[int]) -> str | None:
        """Let checkpoints count no more (collective); return, on every rank, what went wrong, or None."""
        problem = None
        if engine.rank == 0:
            try:
                for step in steps:
                    storage.delete(storage.join(self.uri_of(step), RECORD_NAME))
            except StorageError as error:
                problem = f"{error}"
        return engine.gather(problem)[0]

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, newest first; for one rank."""
        for later in self.steps():
            if later > step:
                storage.delete(storage.join(self.uri_of(later), RECORD_NAME))
                storage.delete_tree(self.uri_of(later))

    def steps(self) -> list[int]:
        """List the steps of the checkpoints that have a record, newest first."""
        return sorted(self._listing()[0], reverse=True)

    def weights(self, step: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Put the averaged weights of a checkpoint together; float32, on the CPU.

        Raises:
            IntegrityError: if a file is damaged.
        """
        record = Checkpoint.read(storage.join(self.uri_of(step), RECORD_NAME))
        names = sorted(name for name in record.files if RANK_FILE.fullmatch(name))
        return assemble((self._state_file(record, name) for name in names), shapes)

    def _look(self, engine: Engine, step: int) -> _Seen | _Unusable:
        """Read what all ranks need to know of a checkpoint: its record and, if it is of another layout, the heads."""
        try:
            record = Checkpoint.read(storage.join(self.uri_of(step), RECORD_NAME))
            names = files_to_load(record.files, record.layout, engine)
            return _Seen(record, self._heads(record, names) if len(names) > 1 else {})
        except UnclipError as error:
            return _Unusable.of(error)

    def _heads(self, record: Checkpoint, names: Sequence[str]) -> Mapping[str, Sequence[Stretch]]:
        with ThreadPoolExecutor(_IO_THREADS) as pool:
            try:
                found = list(pool.map(lambda name: self._state_file(record, name).stretches(), names))
            except IntegrityError:
                return {}  # a damaged head, or one spoiled on its way: to read the whole file tells which
        return dict(zip(names, found, strict=True))

    def _try_load(self, engine: Engine, seen: _Seen) -> Resumed | _Unusable:
        """Load this rank's part of a checkpoint, checked; or say in a few words why that is impossible."""
        record = seen.record
        try:
            names = files_to_load(record.files, record.layout, engine)
            if seen.heads:  # what holds nothing of this rank is left out; the others are read whole, to check them
                names = engine.needed(seen.heads)
                logger.debug(
                    "checkpoint of step %d: rank %d reads %d of %d files",
                    *(record.step, engine.rank, len(names), len(seen.heads)),
                )
            metrics = self._content(record, METRICS_NAME)
            guard = self._content(record, GUARD_NAME) if GUARD_NAME in record.files else b""
            engine.load(self._state_file(record, name) for name in names)
            return Resumed(record.step, metrics, guard)
        except UnclipError as error:
            return _Unusable.of(error)

    def _state_file(self, record: Checkpoint, name: str) -> StateFile:
        return StateFile(*self._place(record, name))

    def _content(self, record: Checkpoint, name: str) -> bytes:
        """Read a small file, checked."""
        uri, wanted = self._place(record, name)
        for _ in range(1 if storage.is_local(uri) else 2):  # what was spoiled on its way is whole the second time
            content = storage.read_bytes(uri)
            if Written(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content)) == wanted:
                return content
        raise IntegrityError(f"{uri}: differs from its record, it is damaged")

    def _place(self, record: Checkpoint, name: str) -> tuple[str, Written]:
        """Say where a file is, and what it was when it was written."""
        uri = storage.join(self.uri_of(record.step), name)
        if name not in record.files:
            raise IntegrityError(f"{uri}: not named in the checkpoint's record")
        return uri, record.files[name]

    def _retain(self) -> None:
        """Delete all but the newest and the permanent checkpoints, and what broken-off writes left before them."""
        whole, broken = self._listing()
        newest = sorted(whole, reverse=True)
        spared = (step for step in newest[self._keep_last :] if step == self.spared_step or self._is_permanent(step))
        doomed = sorted(set(newest[self._keep_last :]) - set(spared))
        doomed += [step for step in broken if step < newest[0]]
        for step in doomed:
            storage.delete(storage.join(self.uri_of(step), RECORD_NAME))
            storage.delete_tree(self.uri_of(step))

    def _is_permanent(self, step: int) -> bool:
        return self._keep_every is not None and step % self._keep_every == 0

    def _listing(self) -> tuple[set[int], set[int]]:
        """List the steps with a record, and those without."""
        found: dict[int, bool] = {}
        for name in storage.list_files(self._uri):
            folder, _, file = name.partition("/")
            if match := _STEP_FOLDER.fullmatch(folder):
                step = int(match[1])
                found[step] = found.get(step, False) or file == RECORD_NAME
        return {step for step, whole in found.items() if whole}, {step for step, whole in found.items() if not whole}

    def uri_of(self, step: int) -> str:
        """Return the folder of a checkpoint, where every rank puts its files."""
        return storage.join(self._uri, f"step-{step:06d}")
