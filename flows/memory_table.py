"""The memory of a training's ranks as people read it: as configured, and in every other way DeepSpeed can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from flows.overview import new_table
from stages.units import GIB

if TYPE_CHECKING:
    from cluster.memory import RankMemory
    from cluster.memory_ways import Way
    from stages.generator_config import GeneratorTraining

_CHOSEN, _TOO_MUCH = "*", "!"
_COLUMNS = {
    ("none", "none"): "no offload",
    ("cpu", "none"): "optimizer: cpu",
    ("nvme", "none"): "optimizer: nvme",
    ("cpu", "cpu"): "optimizer, parameters: cpu",
    ("nvme", "cpu"): "optimizer: nvme, parameters: cpu",
}


def memory_line(name: str, rank: RankMemory) -> str:
    """Say what a rank takes as it is configured."""
    offloaded = f", and {bytes_text(rank.offloaded)} of the CPU's" if rank.offloaded else ""
    on_disk = f", and {bytes_text(rank.on_disk)} in offload_dir" if rank.on_disk else ""
    device = bytes_text(rank.on_device)
    return f"{name}: a rank takes {device} of memory beside data and libraries{offloaded}{on_disk}"


def ways_table(
    found: Mapping[str, Sequence[Way]], configs: Mapping[str, GeneratorTraining], limit_gib: float | None
) -> Table:
    """Show a row per training and ZeRO stage, a column per offload.

    Args:
        found: training -> its ways.
        configs: training -> its settings; the way they choose is marked.
        limit_gib: what torch can use of one GPU, if that is known; what takes more is marked.
    """
    # On the GPU files save no more than the CPU's memory does: who has no use for them is spared the columns.
    in_files = any(config.offload_optimizer == "nvme" for config in configs.values())
    offloads = {offload: title for offload, title in _COLUMNS.items() if in_files or "nvme" not in offload}
    table = new_table("training", "ranks x micro batch", "ZeRO", *offloads.values())
    for name, ways in found.items():
        config = configs[name]
        cells = {(way.zero_stage, way.offload_optimizer, way.offload_parameters): way.memory for way in ways}
        size = config.micro_batch_size or config.global_batch_size // config.num_ranks
        chosen = (config.zero_stage, config.offload_optimizer, config.offload_parameters)
        for stage in sorted({way.zero_stage for way in ways}):
            row = []
            for offload in offloads:
                place = (stage, *offload)
                is_chosen = place == chosen and config.engine == "deepspeed"
                row.append(_cell(cells[place], limit_gib, is_chosen) if place in cells else "")
            table.add_row(name, f"{config.num_ranks} x {size}", str(stage), *row)
    return table


def legend(limit_gib: float | None) -> str:
    """Explain the table's marks."""
    known = f"; {_TOO_MUCH} more than the {limit_gib:g} GiB of gpu_memory_gib" if limit_gib is not None else ""
    places = "a rank where it computes, on its GPU (+ in the CPU's memory, + in offload_dir)"
    return f"{places}; {_CHOSEN} as configured{known}"


def _cell(memory: RankMemory, limit_gib: float | None, is_chosen: bool) -> str:
    cpu = f" + {bytes_text(memory.offloaded)}" if memory.offloaded else ""
    disk = f" + {bytes_text(memory.on_disk)}" if memory.on_disk else ""
    too_much = limit_gib is not None and memory.on_device > limit_gib * GIB
    return f"{_CHOSEN * is_chosen}{_TOO_MUCH * too_much}{bytes_text(memory.on_device)}{cpu}{disk}"


def bytes_text(num: float) -> str:
    """Write a number of bytes in the unit that fits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num < 1024:
            return f"{num:.0f} {unit}" if num >= 100 else f"{num:.3g} {unit}"
        num /= 1024
    return f"{num:,.1f} TiB"
