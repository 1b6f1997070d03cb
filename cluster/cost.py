"""What a run will take: rows, bytes, shards, hours and money per stage, before anything runs.

Every number comes from a throughput that was measured (``throughput.py``), from one that the user states, or from the
store; where there is neither, the number is missing and the plan says how to measure it. Prices and machines are the
user's, in a file (``configs/prices.yaml``).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cluster.room import fewer_ranks, refuse_what_never_fits
from cluster.throughput import Throughput
from stages.base import Stage, setting
from stages.config import Config
from stages.errors import ConfigError
from stages.runner import StageState
from stages.training_config import TrainingConfig
from stages.units import GIB

_HOUR_S = 3600.0
# Whose samples a stage takes in.
_FED_BY = {
    "download": "source",
    "filter": "download",
    "embed": "filter",
    "curate": "embed",
    "ledger": "source",
    "pca": "curate",
}


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A kind of machine, and how many of it there are."""

    num_cpus: float = setting(help="cores of one")
    num_gpus: int = setting(0, "GPUs of one")
    num_nodes: int = setting(1, "how many there are")
    price_per_hour: float | None = setting(None, "of one, in the table's currency; null: not known")
    gpu_memory_gib: float | None = setting(None, "that torch can use of one GPU; null: not known, nothing is checked")

    def __post_init__(self) -> None:
        if self.num_cpus <= 0 or self.num_gpus < 0 or self.num_nodes < 0:
            raise ValueError("num_cpus: must be positive, num_gpus and num_nodes not negative")

    def workers(self, num_cpus: float, num_gpus: float) -> int:
        """Return how many workers of these needs fit on one."""
        by_cpus = math.floor(self.num_cpus / num_cpus + 1e-9) if num_cpus else 1 << 30
        return min(by_cpus, math.floor(self.num_gpus / num_gpus + 1e-9)) if num_gpus else by_cpus


@dataclass(frozen=True, kw_only=True)
class PriceTable:
    """The user's machines and prices."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    currency: str = setting("USD", "what the prices are in")
    data: NodeType = setting(help="machines for stages without GPUs")
    gpu: NodeType | None = setting(None, "machines for stages with GPUs; null: none")
    storage_per_gib_month: float | None = setting(None, "of the store; null: not known")


def this_machine(config: Config) -> PriceTable | None:
    """Describe the machine of a local Ray.

    Returns:
        None where a cluster does the work, whose size is not known here, or one process, which refuses nothing.
    """
    cluster = config.cluster
    if cluster.submit is not None or cluster.address != "local" or cluster.executor == "local":
        return None
    num_cpus = config.cluster.num_cpus or os.cpu_count() or 1
    num_gpus = config.cluster.num_gpus
    if num_gpus is None:
        num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    machine = NodeType(num_cpus=num_cpus, num_gpus=num_gpus)
    if not num_gpus:
        return PriceTable(data=machine)
    from stages.hardware import least_gpu_memory_gib  # it loads torch

    return PriceTable(data=machine, gpu=dataclasses.replace(machine, gpu_memory_gib=least_gpu_memory_gib()))


def refuse_on_this_machine(stages: Iterable[Stage[Any]], machines: PriceTable) -> None:
    """Refuse stages that a local Ray could not hold, as a run would.

    Args:
        stages: those still to be done.
        machines: ``this_machine``.

    Raises:
        ConfigError: with the smallest change that would fit.
    """
    here = {"Resources": {"CPU": machines.data.num_cpus, "GPU": float(machines.data.num_gpus)}, "Labels": {}}
    refuse_what_never_fits(map(_without_wishes, stages), [here])


def _without_wishes(stage: Stage[Any]) -> Stage[Any]:
    """Return a stage without the resources and labels of which only Ray knows whether this machine has them."""
    if not isinstance(stage.config, TrainingConfig):
        return stage
    plain = copy.copy(stage)
    plain.config = dataclasses.replace(stage.config, resources_per_rank={}, node_labels={}, accelerator_type=None)
    return plain


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What one stage will take; None is "not known".

    Attributes:
        stage: its name.
        fingerprint: of the result.
        status: ``done`` (its numbers are counted, and cost nothing more) or ``pending``.
        num_in: samples in; of a training, samples it is shown.
        num_kept: samples out.
        at_most: whether the two are upper bounds, because no share kept is known of a stage before.
        num_shards: units of work.
        num_bytes: published to the store.
        num_workers: workers, or ranks, that the machines have room for.
        worker_hours: work of all workers together.
        hours: from start to end.
        num_nodes: machines in use.
        price: in the table's currency.
        basis: where the throughput is from, or how to get one.
    """

    stage: str
    fingerprint: str
    status: Literal["done", "pending"]
    num_in: int | None = None
    num_kept: int | None = None
    at_most: bool = False
    num_shards: int | None = None
    num_bytes: int | None = None
    num_workers: int | None = None
    worker_hours: float | None = None
    hours: float | None = None
    num_nodes: int | None = None
    price: float | None = None
    basis: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def estimate(
    config: Config,
    stages: Mapping[str, Stage[Any]],
    states: Mapping[str, StageState],
    throughputs: Mapping[str, Throughput],
    *,
    machines: PriceTable | None,
    num_rows: int | None = None,
    assumed: Mapping[str, float] | None = None,
) -> list[StageEstimate]:
    """Estimate every stage.

    Args:
        config: the settings.
        stages: all stages, in order.
        states: what the store holds of each.
        throughputs: what was measured.
        machines: the user's table; None where nothing is known of the machines.
        num_rows: rows of the lists, where the source stage has not counted them yet.
        assumed: stage -> samples per second and worker, stated by the user; goes before what was measured.

    Raises:
        ConfigError: if a stage cannot run on the machines of the table.
    """
    made: dict[str, StageEstimate] = {}
    for name, stage in stages.items():
        state = states[name]
        if state.manifest is not None:
            made[name] = _done(stage, state)
        else:
            samples = _samples(config, name, made, num_rows)
            speed = _speed(name, stage, throughputs.get(name), (assumed or {}).get(name))
            made[name] = _pending(
                stage, state.fingerprint, samples, speed, throughputs.get(name), machines, made, config
            )
    return list(made.values())


def total(estimates: list[StageEstimate], name: str) -> tuple[float, int]:
    """Add up one number over the pending stages; return the sum, and of how many stages it is not known."""
    values = [getattr(item, name) for item in estimates if item.status == "pending"]
    return sum(value for value in values if value is not None), sum(value is None for value in values)


def storage_price(estimates: list[StageEstimate], machines: PriceTable | None) -> float | None:
    """Return what a month of all results costs; None if the price or a size is not known."""
    sizes = [item.num_bytes for item in estimates]
    if machines is None or machines.storage_per_gib_month is None or None in sizes:
        return None
    return sum(size for size in sizes if size is not None) / GIB * machines.storage_per_gib_month


# ---- one stage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Speed:
    """Seconds of work per sample, or in all; None if not known; and where that is from."""

    per_sample_s: float | None
    in_all_s: float | None
    basis: str


@dataclass(frozen=True)
class _Samples:
    num: int | None
    at_most: bool = False


def _done(stage: Stage[Any], state: StageState) -> StageEstimate:
    manifest = state.manifest
    assert manifest is not None
    return StageEstimate(
        stage=stage.name,
        fingerprint=state.fingerprint,
        status="done",
        num_in=manifest.num_in,
        num_kept=manifest.num_kept,
        num_shards=len(manifest.records),
        num_bytes=sum(file.num_bytes for record in manifest.records for file in record.files.values()),
        basis=f"done {manifest.created_at}",
    )


def _samples(config: Config, name: str, made: Mapping[str, StageEstimate], num_rows: int | None) -> _Samples:
    """Tell how many samples a stage that has not run will take in."""
    section = getattr(config, name)
    if name == "source":
        return _Samples(num_rows if section.kind == "urls" else section.shapes.num_images)
    if name in _FED_BY:
        feeder = made[_FED_BY[name]]
        return _Samples(feeder.num_kept, feeder.at_most)
    if isinstance(section, TrainingConfig):
        trains = name != "clip" or config.clip.kind == "train"
        return _Samples(section.num_steps * section.global_batch_size if trains else 0)
    return _Samples(config.generate.num_samples)


def _speed(name: str, stage: Stage[Any], found: Throughput | None, assumed: float | None) -> _Speed:
    if assumed is not None:
        return _Speed(1 / assumed, None, f"assumed: {assumed:g} samples/s and worker")
    if found is None:
        shorter = f" -s {name}.num_steps=50" if isinstance(stage.config, TrainingConfig) else ""
        return _Speed(
            None,
            None,
            f"unknown; measure with `unclip run CONFIG -s root=PILOT --until {name}{shorter}` on a few rows, then "
            f"--measured-in PILOT; or --assume {name}=SAMPLES_PER_S",
        )
    basis = f"measured in {found.root} {found.fingerprint[:8]}"
    if found.samples_per_s > 0:
        return _Speed(1 / found.samples_per_s, None, basis)
    return _Speed(None, found.worker_s, basis)


def _pending(
    stage: Stage[Any],
    fingerprint: str,
    samples: _Samples,
    speed: _Speed,
    found: Throughput | None,
    machines: PriceTable | None,
    made: Mapping[str, StageEstimate],
    config: Config,
) -> StageEstimate:
    is_training = isinstance(stage.config, TrainingConfig)
    num_shards = _num_shards(stage, samples.num, made, config)
    num_workers, num_nodes, price = _room(stage, machines, num_shards)
    worker_s = speed.in_all_s
    if worker_s is None and samples.num is not None and speed.per_sample_s is not None:
        worker_s = samples.num * speed.per_sample_s
    hours = worker_s / num_workers / _HOUR_S if worker_s is not None and num_workers else None
    kept, num_bytes = samples.num, None
    if found is not None:
        per_sample = not is_training and samples.num is not None and found.bytes_per_sample > 0
        num_bytes = round(samples.num * found.bytes_per_sample) if per_sample and samples.num else found.num_bytes
        kept = None if samples.num is None else round(samples.num * found.kept_fraction)
    return StageEstimate(
        stage=stage.name,
        fingerprint=fingerprint,
        status="pending",
        num_in=samples.num,
        num_kept=samples.num if is_training else kept,
        at_most=samples.at_most or (found is None and not is_training and stage.name in _FED_BY),
        num_shards=num_shards,
        num_bytes=num_bytes,
        num_workers=num_workers,
        worker_hours=None if worker_s is None else worker_s / _HOUR_S,
        hours=hours,
        num_nodes=num_nodes,
        price=None if hours is None or price is None or num_nodes is None else hours * price * num_nodes,
        basis=speed.basis,
    )


def _num_shards(
    stage: Stage[Any], num_samples: int | None, made: Mapping[str, StageEstimate], config: Config
) -> int | None:
    name = stage.name
    if name == "source":
        return None if num_samples is None else math.ceil(num_samples / config.source.rows_per_shard)
    if name in _FED_BY:
        return made[_FED_BY[name]].num_shards
    if name == "generate":
        return math.ceil(config.generate.num_samples / config.generate.samples_per_shard)
    return 1


def _room(
    stage: Stage[Any], machines: PriceTable | None, num_shards: int | None
) -> tuple[int | None, int | None, float | None]:
    """Return workers, machines in use and the price of one per hour.

    Raises:
        ConfigError: if a worker, or a training's ranks together, do not fit.
    """
    if machines is None:
        return None, None, None
    needs = stage.resources
    node = machines.gpu if needs.num_gpus else machines.data
    if node is None:
        raise ConfigError(
            f"{stage.name}: needs {needs.num_gpus:g} GPU per worker, and the table of machines has no `gpu`; add it, "
            f"or run on CPUs (-s {_gpu_setting(stage)}=0)"
        )
    per_node = node.workers(needs.num_cpus, needs.num_gpus)
    room = per_node * node.num_nodes
    wanted = max(1, needs.num_ranks)
    if room < wanted:
        have = f"{node.num_nodes} machines with {node.num_cpus:g} cores and {node.num_gpus} GPUs have room for {room}"
        least = f"num_nodes: {math.ceil(wanted / per_node)}" if per_node else "larger machines"
        fewer = fewer_ranks(stage.config, room) if isinstance(stage.config, TrainingConfig) else None
        options = " ".join(f"-s {stage.name}.{name}={value}" for name, value in (fewer or {}).items())
        raise ConfigError(
            f"{stage.name}: {wanted} worker{'s' if wanted > 1 else ''} of {needs.num_cpus:g} cores and "
            f"{needs.num_gpus:g} GPUs, but {have}; the smallest change that fits: {least}"
            + (f", or {options}" if options else "")
        )
    if needs.num_ranks:
        num_workers = needs.num_ranks
    else:
        num_workers = min(x for x in (room, num_shards or room, needs.max_workers or room))
    return num_workers, math.ceil(num_workers / per_node), node.price_per_hour


def _gpu_setting(stage: Stage[Any]) -> str:
    return f"{stage.name}.{'gpus_per_rank' if isinstance(stage.config, TrainingConfig) else 'num_gpus'}"
