"""What ``init_from: {version: production}`` means: one version, decided once for each question and then kept.

The question is the training without its start: the data, the settings, the seed. Whoever begins it first notes which
version was in production then, or that there was none::

    <root>/registry/starts/<question>.json

From then on this training starts from that version, whatever is promoted or rolled back meanwhile: it is resumed
exactly, and once it has been promoted itself the same data and settings are still the training that is done. New data
are another question, which starts from what is in production by then.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from stages import storage, swap
from stages.clock import utc_now
from stages.errors import ConflictError, IntegrityError
from stages.registry import read_production
from stages.withdrawn import refuse_withdrawn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Where a training starts.

    Attributes:
        stage: the training.
        question: names it without its start.
        registry: the store whose production is meant.
        number: the version it starts from; None: from random weights.
        is_kept: whether this has been decided before.
    """

    stage: str
    question: str
    registry: str
    number: int | None
    is_kept: bool


def find_starting_point(root: str, stage: str, question: str, registry: str) -> StartingPoint:
    """Read what was decided; for a new question, what is in production now. Writes nothing.

    Args:
        root: the run's store, which keeps the decision.
        stage: the training.
        question: names it without its start.
        registry: the store whose production is meant.

    Raises:
        IntegrityError: if the decision or the record of production is damaged.
    """
    uri = _uri(root, question)
    if not storage.exists(uri):
        number = read_production(registry).number
        return StartingPoint(stage=stage, question=question, registry=registry, number=number, is_kept=False)
    kept = storage.read_json(uri)
    if not isinstance(kept, dict) or not isinstance(kept.get("version", ""), int | None):
        raise IntegrityError(f"{uri}: not a starting point; restore it from a backup")
    number = kept["version"]
    return StartingPoint(stage=stage, question=question, registry=registry, number=number, is_kept=True)


def keep_starting_point(root: str, start: StartingPoint) -> None:
    """Decide where a training starts, before it does.

    Raises:
        InputError: if the version has been withdrawn.
        ConflictError: if another run has decided otherwise meanwhile.
    """
    if start.number is not None:
        what = f"{start.stage}.init_from (train from random weights: unclip retrain --from-scratch)"
        refuse_withdrawn(start.registry, start.number, what)
    if start.is_kept:
        return
    if swap.create(_uri(root, start.question), _record(start)) is None:
        decided = find_starting_point(root, start.stage, start.question, start.registry).number
        if decided != start.number:
            raise ConflictError(
                f"{start.stage}.init_from: another run has begun this training from version {decided}; run again"
            )
    where = "random weights, nothing is in production" if start.number is None else f"version {start.number}"
    logger.info("%s: starts from %s", start.stage, where, extra={"stage": start.stage})


def start_from_scratch(root: str, start: StartingPoint) -> None:
    """Decide that a training starts from random weights, also where it was decided otherwise."""
    swap.update(_uri(root, start.question), lambda _: _record(replace(start, number=None)))


def _record(start: StartingPoint) -> bytes:
    return storage.json_bytes({"stage": start.stage, "version": start.number, "at": utc_now()})


def _uri(root: str, question: str) -> str:
    return storage.join(root, "registry/starts", f"{question}.json")
