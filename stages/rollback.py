"""Going back: after too many bad steps in a row a training resumes from an earlier checkpoint, more carefully.

A rollback is one line of history, and a resume. The line says that from ``to_step`` on the learning rate is scaled
down, and that the data goes on where the bad stretch ended instead of repeating what led there. So the position in the
data stays a function of the step, ``step + data_offset``, and whatever happens afterwards, a kill included, goes the
way of every resume::

    <folder>/rollbacks.json      the history, oldest first; written once the checkpoints it undoes are gone

A training killed before the line is written resumes from a checkpoint of before and comes to the same decision again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages import storage
from stages.checkpoints import CheckpointFolder
from stages.engine import Engine
from stages.errors import IntegrityError, NotFoundError, StageError

logger = logging.getLogger(__name__)

ROLLBACKS_NAME = "rollbacks.json"
_FORMAT_VERSION = 1
_NUM_SHOWN = 3  # bad steps that are named


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One rollback.

    Attributes:
        from_step: optimizer steps done when it was decided.
        to_step: the checkpoint gone back to.
        data_offset: from ``to_step`` on, step k trains on the data of step ``k + data_offset``.
        learning_rate_scale: from ``to_step`` on, what the learning rate is multiplied with.
        bad_steps: what was seen of the bad stretch.
    """

    from_step: int
    to_step: int
    data_offset: int
    learning_rate_scale: float
    bad_steps: Sequence[str]


@dataclass(frozen=True)
class RollbackHistory:
    """The rollbacks of a training that are in force, oldest first."""

    rollbacks: Sequence[Rollback] = ()

    @property
    def data_offset(self) -> int:
        """How far the data is ahead of the step."""
        return self.rollbacks[-1].data_offset if self.rollbacks else 0

    @property
    def learning_rate_scale(self) -> float:
        """What the scheduled learning rate is multiplied with."""
        return self.rollbacks[-1].learning_rate_scale if self.rollbacks else 1.0

    def as_of(self, step: int) -> RollbackHistory:
        """Return what is in force for a training that resumes at a step.

        If the checkpoint of a rollback turned out to be damaged and an older one is taken, the way from there is gone
        anew, up to the decision.
        """
        return RollbackHistory([rollback for rollback in self.rollbacks if rollback.to_step <= step])

    def and_back(
        self, *, from_step: int, to_step: int, learning_rate_factor: float, bad_steps: Sequence[str]
    ) -> RollbackHistory:
        """Add a rollback."""
        rollback = Rollback(
            from_step=from_step,
            to_step=to_step,
            data_offset=from_step + self.data_offset - to_step,
            learning_rate_scale=self.learning_rate_scale * learning_rate_factor,
            bad_steps=tuple(bad_steps),
        )
        return RollbackHistory([*self.rollbacks, rollback])

    @classmethod
    def read(cls, folder: str) -> RollbackHistory:
        """Read the history of a training from its folder; there need not be one.

        Raises:
            IntegrityError: if the file is not such a history.
        """
        uri = storage.join(folder, ROLLBACKS_NAME)
        try:
            value: Any = storage.read_json(uri)
        except NotFoundError:
            return cls()
        if not isinstance(value, dict) or value.get("format_version") != _FORMAT_VERSION:
            raise IntegrityError(f"{uri}: not a history of rollbacks of format {_FORMAT_VERSION}")
        return cls([Rollback(**rollback) for rollback in value["rollbacks"]])

    def write(self, folder: str) -> None:
        """Write the history to the training's folder."""
        rollbacks = [asdict(rollback) for rollback in self.rollbacks]
        storage.write_json(
            storage.join(folder, ROLLBACKS_NAME), {"format_version": _FORMAT_VERSION, "rollbacks": rollbacks}
        )


def rollback_target(steps: Sequence[int], num_good_steps: int, checkpoint_every_steps: int) -> int | None:
    """Choose the checkpoint to go back to.

    That is the newest regular one from before the bad stretch: one written because a request to stop came in between
    is taken only for want of another, so that whether there was such a request does not change the result.

    Args:
        steps: of the checkpoints there are.
        num_good_steps: optimizer steps done before the bad stretch.
        checkpoint_every_steps: distance of the regular ones.

    Returns:
        None if there is no checkpoint.
    """
    before = [step for step in steps if step <= num_good_steps]
    if not before:
        # The weights are those of before the stretch, for a bad step changes none.
        return min(steps, default=None)
    return max(before, key=lambda step: (step % checkpoint_every_steps == 0, step))


@dataclass(frozen=True, kw_only=True)
class Rollbacks:
    """Rolls a training back; every method is collective.

    Attributes:
        engine: of this rank.
        checkpoints: of the training.
        folder: URI of the training's folder.
        place: the stage, for messages.
        max_rollbacks: how often.
        learning_rate_factor: what each multiplies the learning rate with.
        checkpoint_every_steps: distance of the regular checkpoints.
    """

    engine: Engine
    checkpoints: CheckpointFolder
    folder: str
    place: str
    max_rollbacks: int
    learning_rate_factor: float
    checkpoint_every_steps: int

    def history(self, step: int) -> RollbackHistory:
        """Return what is in force for a training that resumes at a step, as the first rank reads it."""
        if self.engine.rank > 0:
            return self.engine.gather(RollbackHistory())[0]
        stored = RollbackHistory.read(self.folder)
        history = stored.as_of(step)
        if len(history.rollbacks) < len(stored.rollbacks):
            history.write(self.folder)
        return self.engine.gather(history)[0]

    def go_back(self, history: RollbackHistory, num_done: int, bad_steps: Sequence[str]) -> None:
        """Make the training resume from before a bad stretch, more carefully.

        Args:
            history: what is in force.
            num_done: optimizer steps done, the bad ones included.
            bad_steps: what is known of each of them.

        Raises:
            StageError: if there is no checkpoint, or it has gone back often enough.
        """
        steps = self.engine.gather(self.checkpoints.steps())[0]
        to_step = rollback_target(steps, num_done - len(bad_steps), self.checkpoint_every_steps)
        if to_step is None or len(history.rollbacks) >= self.max_rollbacks:
            raise self._given_up(history, to_step, num_done, bad_steps)
        longer = history.and_back(
            from_step=num_done,
            to_step=to_step,
            learning_rate_factor=self.learning_rate_factor,
            bad_steps=bad_steps[-_NUM_SHOWN:],
        )
        if self.engine.rank == 0:
            logger.warning(
                "%s: %d bad steps in a row; back from step %d to %d, with %g of the learning rate and the data after "
                "the bad steps; the last of them: %s",
                *(self.place, len(bad_steps), num_done, to_step, longer.learning_rate_scale, bad_steps[-1]),
            )
            self.checkpoints.forget_after(to_step)
            longer.write(self.folder)
        self.engine.gather(None)

    def _given_up(
        self, history: RollbackHistory, last: int | None, num_done: int, bad_steps: Sequence[str]
    ) -> StageError:
        tried = f"after {len(history.rollbacks)} rollbacks" if history.rollbacks else "with no rollback"
        if last is None:
            found = "there is no checkpoint to go back to"
        else:
            found = f"the checkpoint to go back to is of step {last}; {self.place}.max_rollbacks: {self.max_rollbacks}"
        first = num_done - len(bad_steps) + history.data_offset
        return StageError(
            f"{self.place}: {len(bad_steps)} bad steps in a row up to step {num_done}, {tried}; {found}. "
            f"The last ones: {'; '.join(bad_steps[-_NUM_SHOWN:])}. Lower {self.place}.learning_rate, raise "
            f"{self.place}.warmup_steps, set {self.place}.precision: fp32, or look at the data of steps {first} to "
            f"{num_done - 1 + history.data_offset}"
        )
