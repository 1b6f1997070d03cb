"""How many ranks a training goes on with, when its cluster has lost nodes and no others come."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stages.base import Resources, Stage
from stages.errors import StageError
from stages.training_config import TrainingConfig

logger = logging.getLogger(__name__)

_PROBE_S = 5.0
_ANY_NUMBER = 1 << 20  # of workers that need nothing


def with_room(stage: Stage[Any], is_stopping: Callable[[], bool]) -> Stage[Any]:
    """Wait until a training's ranks have room, or for ``shrink_after_minutes``; then let fewer ranks do it.

    Whatever their number, ranks see the same samples in the same steps, and read each other's checkpoints. Without
    ``min_ranks`` the wait is as long as it takes: a group of Ray Train's waits, too, but nobody can stop that.

    Args:
        stage: the training.
        is_stopping: whether it is to end meanwhile.

    Returns:
        The stage, or a copy of it with as many ranks as the nodes that are left can hold.

    Raises:
        StageError: if it is to end.
    """
    config: TrainingConfig = stage.config
    began_at = time.monotonic()
    while not _is_room(stage.resources):
        if is_stopping():
            raise StageError(f"{stage.name}: stopped while it waited for room; run again to go on")
        if config.min_ranks is None or time.monotonic() - began_at < config.shrink_after_minutes * 60:
            continue
        began_at = time.monotonic()
        room = num_ranks_on(alive_nodes(), stage.resources)
        if room >= config.num_ranks:
            continue  # others are using it
        if (fewer := shrunk(config, room)) is None:
            logger.warning(
                "%s: the nodes that are left have room for %d ranks, fewer than min_ranks: %d; the training waits",
                *(stage.name, room, config.min_ranks),
            )
            continue
        logger.warning(
            "%s: the nodes that are left have room for %d of %d ranks; the training goes on with %d",
            *(stage.name, room, config.num_ranks, fewer.num_ranks),
        )
        stage = copy.copy(stage)
        stage.config = config = fewer
    return stage


def shrunk(config: TrainingConfig, room: int) -> TrainingConfig | None:
    """Return the same training with the most ranks that ``room`` allows, in micro batches no larger than before.

    Returns:
        None if that would be fewer than ``min_ranks``.
    """
    assert config.min_ranks is not None
    micro = config.micro_batch_size or config.global_batch_size // config.num_ranks
    for num_ranks in range(min(room, config.num_ranks - 1), config.min_ranks - 1, -1):
        if config.num_streams % num_ranks == 0:
            num_local = config.global_batch_size // num_ranks
            size = next(size for size in range(min(micro, num_local), 0, -1) if num_local % size == 0)
            return dataclasses.replace(config, num_ranks=num_ranks, micro_batch_size=size)
    return None


def num_ranks_on(nodes: Sequence[Mapping[str, Any]], resources: Resources) -> int:
    """Count the ranks that nodes could hold if nobody else used them.

    Args:
        nodes: of ``ray.nodes()``.
        resources: of the training.
    """
    wanted = per_rank(resources)
    held = []
    for node in nodes:
        has, labels = node["Resources"], node.get("Labels", {})
        if all(labels.get(key) == value for key, value in resources.node_labels.items()):
            each = (math.floor(has.get(name, 0) / amount + 1e-9) for name, amount in wanted.items() if amount)
            held.append(min(each, default=_ANY_NUMBER))
    if resources.placement == "strict_pack":
        return max(held, default=0)
    if resources.placement == "strict_spread":
        return sum(number > 0 for number in held)
    return sum(held)


def per_rank(resources: Resources) -> dict[str, float]:
    """Return what one rank needs, as Ray wants it."""
    gpus = {"GPU": resources.num_gpus} if resources.num_gpus > 0 else {}
    kind = {f"accelerator_type:{resources.accelerator_type}": 0.001} if resources.accelerator_type else {}
    return {"CPU": resources.num_cpus, **gpus, **resources.custom, **kind}


def alive_nodes() -> list[Mapping[str, Any]]:
    """List the nodes that the cluster has at present, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def asked_for(resources: Resources) -> Iterator[Any]:
    """Ask for the places of a group during a ``with`` block; an autoscaler learns of it what is missing.

    Args:
        resources: of the training.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    num_ranks = max(1, resources.num_ranks)
    places = placement_group(
        [per_rank(resources)] * num_ranks,
        strategy=resources.placement.upper(),
        bundle_label_selector=[dict(resources.node_labels)] * num_ranks if resources.node_labels else None,
    )
    try:
        yield places
    finally:
        remove_placement_group(places)


def _is_room(resources: Resources) -> bool:
    """Try to get the places of a group, for a few seconds."""
    with asked_for(resources) as places:
        return bool(places.wait(_PROBE_S))
