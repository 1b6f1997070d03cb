"""Saving beside the training: a step waits for a copy of the state in memory, not for the store.

A checkpoint is begun by all ranks together, written by one thread on each, and counts once every rank has said that its
files are in the store and the first rank has written the record. Threads talk to nobody: what has to be agreed on is
agreed on by the loop, between two steps. One save is under way at most; the next one waits for it.
"""

from __future__ import annotations

import logging
import socket
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from stages import storage
from stages.checkpoints import CheckpointFolder
from stages.engine import Engine
from stages.errors import StageError, StorageError
from stages.sharded_state import Snapshot
from stages.storage import Written

logger = logging.getLogger(__name__)


class _Upload:
    """Files of one rank on their way into the store."""

    def __init__(self, folder: str, engine: Engine, extra: Mapping[str, bytes]) -> None:
        self.files: dict[str, Written] = {}
        self.error: Exception | None = None
        self._folder = folder
        self._snapshot: Snapshot | None = None
        self._extra = extra
        try:
            self._snapshot = engine.snapshot()
        except StorageError as error:  # of a copy in a file; the other ranks learn of it when the save is finished
            self.error = error
        self._thread = threading.Thread(target=self._work, name="unclip-checkpoint", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the files are there, or will not be."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _work(self) -> None:
        if self.error is not None:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="unclip-checkpoint-") as scratch:
                self._put_together(Path(scratch))
                for path in sorted(Path(scratch).iterdir()):
                    self.files[path.name] = storage.upload(path, storage.join(self._folder, path.name))
        except Exception as error:
            self.error = error

    def _put_together(self, scratch: Path) -> None:
        """Write the files into a local folder."""
        try:
            for name, content in self._extra.items():
                (scratch / name).write_bytes(content)
            if self._snapshot is not None:
                self._snapshot.write(scratch)
                self._snapshot = None  # its memory is needed
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"cannot write {scratch} on {socket.gethostname()}: {error}; free some space there, or set TMPDIR to a "
                "folder with room for a rank's part of a checkpoint"
            ) from error


class Saver:
    """Writes the checkpoints of one training; every rank has one and calls it at the same steps.

    Args:
        checkpoints: where they go.
        engine: whose state is saved.
        place: the stage, for messages.
        newest: step of the checkpoint that the training was resumed from.
        in_background: whether the training goes on while files are written.
        max_failures: saves in a row that may fail before the training stops; the last one of a training may not.

    Attributes:
        newest: step of the newest checkpoint that counts, as far as this training knows.
    """

    def __init__(
        self,
        checkpoints: CheckpointFolder,
        engine: Engine,
        *,
        place: str,
        newest: int | None,
        in_background: bool,
        max_failures: int,
    ) -> None:
        self._checkpoints = checkpoints
        self._engine = engine
        self._place = place
        self._in_background = in_background
        self._max_failures = max_failures
        self._num_failures = 0
        self.newest = newest
        self._failed: list[int] = []
        self._under_way: tuple[int, _Upload] | None = None

    @property
    def ready(self) -> bool:
        """Whether this rank's part of a save has ended, and only the others' and the record are missing."""
        return self._under_way is not None and self._under_way[1].ended

    def spare(self, step: int | None) -> None:
        """Keep the checkpoint of a step, however old it gets; None: of no one."""
        self._checkpoints.spared_step = step

    def save(self, step: int, extra: Mapping[str, bytes], *, wait: bool = False) -> None:
        """Begin a checkpoint (collective).

        Args:
            step: optimizer steps done.
            extra: further files of this rank, by name.
            wait: whether it has to count before this returns.

        Raises:
            StageError: if it has to count and cannot be written, or too many before it could not.
        """
        self.finish()
        problem = self._checkpoints.begin(self._engine, step)
        if problem is not None:
            self._note_failure(step, problem, may_fail=not wait)
        else:
            self._under_way = step, _Upload(self._checkpoints.uri_of(step), self._engine, extra)
            if wait or not self._in_background:
                self.finish(may_fail=not wait)

    def finish(self, *, may_fail: bool = True) -> None:
        """Wait for the checkpoint under way, if any, and make it count (collective).

        Raises:
            StageError: if it could not be written and that may not be, or not once more.
        """
        if self._under_way is None:
            return
        step, upload = self._under_way
        self._under_way = None
        upload.wait()
        problem = self._checkpoints.commit(self._engine, step, upload.files, upload.error)
        if problem is None:
            self._num_failures, self.newest = 0, step
        else:
            self._note_failure(step, problem, may_fail=may_fail)

    def _note_failure(self, step: int, problem: str, *, may_fail: bool) -> None:
        self._num_failures += 1
        self._failed.append(step)
        if may_fail and self._num_failures < self._max_failures:
            if self._engine.rank == 0:
                logger.warning("%s: the checkpoint of step %d is not written: %s", self._place, step, problem)
            return
        newest = "none was written before" if self.newest is None else f"that of step {self.newest} is whole"
        raise StageError(f"{self._place}: the checkpoint of step {step} cannot be written ({newest}): {problem}")

    def take_failed(self) -> list[int]:
        """Return the steps whose saves have failed since this was asked last."""
        failed, self._failed = self._failed, []
        return failed

    def close(self) -> None:
        """Wait for this rank's thread, without making its checkpoint count: what the end of a failed training does."""
        if self._under_way is not None:
            self._under_way[1].wait()
            self._under_way = None
