"""Whether a cluster's nodes could ever hold a stage's workers, and the smallest change with which they could.

What others are doing there counts for nothing: that ends. What no node has, even idle, is waited for only where nodes
may join, and there no longer than the user says.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.elastic import alive_nodes, asked_for, num_ranks_on, per_rank, shrunk
from stages.base import Resources, Stage
from stages.errors import ConfigError, StageError
from stages.training_config import TrainingConfig

logger = logging.getLogger(__name__)

Node = Mapping[str, Any]  # as ``ray.nodes()`` describes one
_ASK_EVERY_S = 1.0
# Where work is done is given up before how much of it is done at once, and that before what it is done on.
_WEIGHTS = {"micro_batch_size": 0, "num_ranks": 2, "cpus_per_rank": 2, "num_cpus": 2, "gpus_per_rank": 4, "num_gpus": 4}


def refuse_what_never_fits(stages: Iterable[Stage[Any]], nodes: Sequence[Node]) -> None:
    """Refuse stages that the nodes of a cluster that cannot grow could not hold.

    Args:
        stages: those to be run.
        nodes: all nodes, as of ``ray.nodes()``.

    Raises:
        ConfigError: names what is missing, and the smallest change with which the nodes would do.
    """
    for stage in stages:
        if not could_hold(nodes, stage):
            change = (
                smallest_change(stage, nodes) or "give Ray more of this machine (cluster.num_cpus, cluster.num_gpus)"
            )
            raise ConfigError(
                f"{missing(stage, nodes)}, and none can join a Ray that runs on this machine alone; {change}, or run "
                "it on a cluster that offers more (cluster.submit, cluster.address)"
            )


def await_nodes(stage: Stage[Any], limit_s: float | None, is_stopping: Callable[[], bool]) -> None:
    """Wait until a growing cluster has nodes that could hold a training; an autoscaler learns of it what is missing.

    Args:
        stage: the training.
        limit_s: how long; None: as long as it takes.
        is_stopping: whether the training is to end meanwhile.

    Raises:
        StageError: if there are none at the end of that time, or the training is to end.
    """
    if could_hold(nodes := alive_nodes(), stage):
        return
    at_most = "" if limit_s is None else f" for at most {limit_s:g} s (cluster.wait_for_nodes_s)"
    logger.warning("%s; the training waits for nodes%s", missing(stage, nodes), at_most)
    began_at = time.monotonic()
    with asked_for(stage.resources):
        while not could_hold(nodes := alive_nodes(), stage):
            if is_stopping():
                raise StageError(f"{stage.name}: stopped while it waited for nodes; run again to go on")
            if limit_s is not None and time.monotonic() - began_at > limit_s:
                raise not_in_time(stage, nodes, limit_s)
            time.sleep(_ASK_EVERY_S)


def not_in_time(stage: Stage[Any], nodes: Sequence[Node], limit_s: float) -> StageError:
    """Return the error of a stage that has waited long enough for nodes that could hold it."""
    change = smallest_change(stage, nodes)
    return StageError(
        f"{missing(stage, nodes)}, and none that does has joined within {limit_s:g} s; add such nodes, raise "
        f"cluster.wait_for_nodes_s{', or ask for less: ' * bool(change)}{change}; what is committed is kept"
    )


def could_hold(nodes: Sequence[Node], stage: Stage[Any]) -> bool:
    """Tell whether nodes could hold one worker of a stage, or as many ranks of a training as it can do with.

    Args:
        nodes: as of ``ray.nodes()``.
        stage: the stage.
    """
    least = 1
    if stage.gang:
        least = max(1, getattr(stage.config, "min_ranks", None) or stage.resources.num_ranks)
    return num_ranks_on(nodes, stage.resources) >= least


def missing(stage: Stage[Any], nodes: Sequence[Node]) -> str:
    """Say what a stage's workers need, and what the nodes have for it."""
    resources = stage.resources
    room = num_ranks_on(nodes, resources)
    who = "a worker needs"
    if stage.gang:
        who = "each rank needs" if resources.num_ranks < 2 else f"each of {resources.num_ranks} ranks needs"
    placed = f" ({resources.placement})" if resources.placement.startswith("strict") else ""
    offer = f"have room for {room}{placed}" if room else "do not offer that"
    return f"{stage.name}: {who} {needs(resources)}; the cluster's nodes ({_have(nodes)}) {offer}"


def needs(resources: Resources) -> str:
    """Write down what one worker or rank needs."""
    labelled = f" on nodes with labels {dict(resources.node_labels)}" if resources.node_labels else ""
    return ", ".join(f"{amount:g} {name}" for name, amount in per_rank(resources).items() if amount) + labelled


def smallest_change(stage: Stage[Any], nodes: Sequence[Node]) -> str:
    """Name the smallest change with which nodes could hold a stage; empty if there is none."""
    for changes in _smallest_first(stage, nodes):
        options = " ".join(f"-s {stage.name}.{name}={_written(value)}" for name, value in changes.items())
        return f"the smallest change that fits: {options}"
    return ""


def _smallest_first(stage: Stage[Any], nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """List the changes of settings with which nodes could hold a stage, the smallest first."""
    singles = list(_single_changes(stage, nodes))
    chosen = itertools.chain.from_iterable(itertools.combinations(singles, n) for n in range(len(singles) + 1))
    found = []
    for change in chosen:
        changes = {name: value for single in change for name, value in single.items()}
        if (changed := _changed(stage, changes)) is None:
            continue
        if could_hold(nodes, changed):
            found.append(changes)
        elif (fewer := _fewer_ranks(changed, nodes)) is not None:
            found.append(changes | fewer)
    return sorted(found, key=lambda changes: sum(_WEIGHTS.get(name, 1) for name in changes))


def _single_changes(stage: Stage[Any], nodes: Sequence[Node]) -> Iterator[dict[str, Any]]:
    """Yield the settings that may be in the way, each at the value that asks for the least."""
    config, resources = stage.config, stage.resources
    most = {name: max((node["Resources"].get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
    is_training = isinstance(config, TrainingConfig)
    if is_training and resources.placement != "pack":
        yield {"placement": "pack"}
    for name in ("node_labels", "resources_per_rank"):
        if getattr(config, name, None):
            yield {name: {}}
    if getattr(config, "accelerator_type", None) is not None:
        yield {"accelerator_type": None}
    cpus, gpus = ("cpus_per_rank", "gpus_per_rank") if is_training else ("num_cpus", "num_gpus")
    if hasattr(config, cpus) and resources.num_cpus > most["CPU"] > 0:
        yield {cpus: most["CPU"]}
    if hasattr(config, gpus) and resources.num_gpus > 0:
        yield {gpus: 0 if is_training or most["GPU"] >= resources.num_gpus else most["GPU"]}


def _changed(stage: Stage[Any], changes: Mapping[str, Any]) -> Stage[Any] | None:
    """Return a copy of a stage with other settings; None if they contradict each other."""
    changed = copy.copy(stage)
    try:
        changed.config = dataclasses.replace(stage.config, **changes)
    except ValueError:
        return None
    return changed


def _fewer_ranks(stage: Stage[Any], nodes: Sequence[Node]) -> dict[str, Any] | None:
    """Find as many ranks as there is room for; None where fewer are no help, or the stage is no training."""
    config = stage.config
    if not isinstance(config, TrainingConfig) or stage.resources.num_ranks < 2:
        return None
    return fewer_ranks(config, num_ranks_on(nodes, stage.resources))


def fewer_ranks(config: TrainingConfig, room: int) -> dict[str, Any] | None:
    """Return the settings of a training on at most ``room`` ranks that holds no larger micro batches than now.

    Returns:
        None if it cannot be done with so few.
    """
    if room < 1 or (found := shrunk(dataclasses.replace(config, min_ranks=1), room)) is None:
        return None
    names = ("num_ranks", "micro_batch_size")
    return {name: getattr(found, name) for name in names if getattr(found, name) != getattr(config, name)}


def _have(nodes: Sequence[Node]) -> str:
    has = sorted({", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes})
    return f"{len(nodes)}: {' | '.join(has)}" if has else "none"


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)
