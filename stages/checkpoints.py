"""Checkpoints of a training: written like any other output, the record last.

Layout::

    <folder>/checkpoints/step-000123/rank-0000.safetensors     every rank writes its own files
    <folder>/checkpoints/step-000123/metrics.jsonl             the metrics up to this step
    <folder>/checkpoints/step-000123/checkpoint.json           step, files, checksums; its presence means whole
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages import storage
from stages.engine import Engine, files_to_load
from stages.errors import IntegrityError, StorageError, UnclipError
from stages.metrics import METRICS_NAME
from stages.sharded_state import RANK_FILE, assemble
from stages.storage import Written

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
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
            StorageError: if it is missing or no JSON.
            IntegrityError: if it is of another format.
        """
        value = storage.read_json(uri)
        if not isinstance(value, dict) or value.pop("format_version", None) != FORMAT_VERSION:
            raise IntegrityError(f"{uri}: not a checkpoint record of format {FORMAT_VERSION}")
        value["files"] = {name: Written(**written) for name, written in value["files"].items()}
        return cls(**value)


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on: the step, and the metric lines up to it."""

    step: int
    metrics: bytes


class CheckpointFolder:
    """All checkpoints of one training.

    Args:
        folder: URI of the training's folder.
        keep_last: how many checkpoints to keep.
    """

    def __init__(self, folder: str, keep_last: int) -> None:
        self._uri = storage.join(folder, "checkpoints")
        self._keep_last = keep_last
        self.spared_step: int | None = None  # kept too: the best step so far of a training that may stop early

    def save(self, engine: Engine, step: int, metrics: bytes) -> None:
        """Write a checkpoint with all ranks (collective), then delete the oldest ones.

        Args:
            engine: its state is saved.
            step: optimizer steps done.
            metrics: lines up to this step; only the first rank's are written.
        """
        target = self._step_uri(step)
        if engine.rank == 0:
            storage.delete(storage.join(target, RECORD_NAME))  # of a damaged checkpoint that is done again
        engine.gather(None)
        with tempfile.TemporaryDirectory(prefix="unclip-checkpoint-") as scratch:
            engine.save(Path(scratch))
            if engine.rank == 0:
                (Path(scratch) / METRICS_NAME).write_bytes(metrics)
            own = {
                path.name: storage.upload(path, storage.join(target, path.name))
                for path in sorted(Path(scratch).iterdir())
            }
        files = {name: written for part in engine.gather(own) for name, written in part.items()}
        if engine.rank == 0:
            record = Checkpoint(step=step, layout=engine.layout, world_size=engine.world_size, files=files)
            storage.write_json(storage.join(target, RECORD_NAME), record.to_json())
            self._retain()
        engine.gather(None)  # nobody leaves before the checkpoint counts

    def resume(self, engine: Engine) -> Resumed | None:
        """Load the newest whole checkpoint into the engine (collective).

        A checkpoint that any rank finds damaged is passed over by all, with a warning.

        Returns:
            None if there is no whole checkpoint.
        """
        for step in engine.gather(self.steps())[0]:
            with contextlib.ExitStack() as stack:
                fetched = self._try_fetch(engine, step, stack)
                errors = [error for error in engine.gather(None if not isinstance(fetched, str) else fetched) if error]
                if errors:
                    logger.warning("checkpoint of step %d is passed over: %s", step, errors[0])
                    continue
                assert not isinstance(fetched, str)
                engine.load(fetched[0])
                return Resumed(step, fetched[1])
        return None

    def steps(self) -> list[int]:
        """List the steps of the checkpoints that have a record, newest first."""
        return sorted(self._listing()[0], reverse=True)

    def weights(self, step: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Put the averaged weights of a checkpoint together; float32, on the CPU.

        Raises:
            IntegrityError: if a file is damaged.
        """
        record = Checkpoint.read(storage.join(self._step_uri(step), RECORD_NAME))
        names = sorted(name for name in record.files if RANK_FILE.fullmatch(name))
        with contextlib.ExitStack() as stack:
            return assemble([self._fetch(record, name, stack) for name in names], shapes)

    def _try_fetch(self, engine: Engine, step: int, stack: contextlib.ExitStack) -> tuple[Sequence[Path], bytes] | str:
        """Get this rank's files of a checkpoint, checked; or say in a few words why that is impossible."""
        try:
            record = Checkpoint.read(storage.join(self._step_uri(step), RECORD_NAME))
            names = files_to_load(record.files, record.layout, engine)
            paths = [self._fetch(record, name, stack) for name in names]
            return paths, self._fetch(record, METRICS_NAME, stack).read_bytes()
        except (UnclipError, TypeError, KeyError) as error:
            return f"{error}"

    def _fetch(self, record: Checkpoint, name: str, stack: contextlib.ExitStack) -> Path:
        uri = storage.join(self._step_uri(record.step), name)
        if name not in record.files:
            raise IntegrityError(f"{uri}: not named in the checkpoint's record")
        path = stack.enter_context(storage.local_copy(uri))
        wanted = record.files[name]
        if path.stat().st_size != wanted.num_bytes or storage.sha256_of(path) != wanted.sha256:
            raise IntegrityError(f"{uri}: differs from its record, it is damaged")
        return path

    def _retain(self) -> None:
        """Delete all but the newest ``keep_last`` checkpoints, and what broken-off writes left before them."""
        whole, broken = self._listing()
        newest = sorted(whole, reverse=True)
        old = (step for step in newest[self._keep_last :] if step != self.spared_step)
        doomed = [*old, *(step for step in broken if step < newest[0])]
        for step in doomed:
            with contextlib.suppress(StorageError):  # a leftover costs space only; the next checkpoint tries again
                storage.delete(storage.join(self._step_uri(step), RECORD_NAME))
                storage.delete_tree(self._step_uri(step))

    def _listing(self) -> tuple[set[int], set[int]]:
        """List the steps with a record, and those without."""
        found: dict[int, bool] = {}
        for name in storage.list_files(self._uri):
            folder, _, file = name.partition("/")
            if match := _STEP_FOLDER.fullmatch(folder):
                step = int(match[1])
                found[step] = found.get(step, False) or file == RECORD_NAME
        return {step for step, whole in found.items() if whole}, {step for step, whole in found.items() if not whole}

    def _step_uri(self, step: int) -> str:
        return storage.join(self._uri, f"step-{step:06d}")
