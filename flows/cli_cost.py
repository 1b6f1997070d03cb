"""``unclip plan --cost``: what a run will take, shown before it runs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flows.console import open_console, print_json
from flows.memory_table import bytes_text, legend, memory_line, ways_table
from flows.overview import new_table
from flows.progress import format_duration
from flows.project import Project
from stages.errors import ConfigError

if TYPE_CHECKING:
    from cluster.cost import PriceTable, StageEstimate
    from cluster.memory import RankMemory
    from cluster.memory_ways import Way
    from stages.generator_config import GeneratorTraining

_UNKNOWN = "[dim]unknown[/]"


def cost_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip plan --cost``."""
    group = parser.add_argument_group("what it will take")
    group.add_argument("--cost", action="store_true", help="rows, bytes, hours and price per stage")
    group.add_argument("--prices", metavar="FILE", help="your machines and prices, as in configs/prices.yaml")
    group.add_argument("--rows", type=int, metavar="N", help="rows of the lists, where they are not counted yet")
    group.add_argument(
        "--assume", action="append", default=[], metavar="STAGE=X", help="X samples per second and worker; repeatable"
    )
    group.add_argument(
        "--measured-in", action="append", default=[], metavar="ROOT", help="another store to take speeds from"
    )


def refuse_without_cost(args: argparse.Namespace) -> None:
    """Refuse options of the estimate where none is asked for."""
    given = {"--prices": args.prices, "--rows": args.rows, "--assume": args.assume, "--measured-in": args.measured_in}
    for name, value in given.items():
        if value not in (None, []):
            raise ConfigError(f"{name}: goes with --cost only")


def show_cost(args: argparse.Namespace, project: Project) -> int:
    """Estimate every stage and show it."""
    from cluster.cost import PriceTable, estimate, refuse_on_this_machine, storage_price, this_machine, total
    from cluster.throughput import measured
    from stages.config import load_file

    machines = load_file(PriceTable, args.prices) if args.prices else this_machine(project.config)
    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows {args.rows}: is below 1")
    if machines is not None and not args.prices:
        pending = [stage for name, stage in project.stages.items() if project.states[name].manifest is None]
        refuse_on_this_machine(pending, machines)
    for root in args.measured_in:
        if not any(measured(project.stages, [root]).values()):
            raise ConfigError(f"--measured-in {root}: holds no result whose speed could be told")
    found = measured(project.stages, [project.config.root, *args.measured_in])
    estimates = estimate(
        project.config,
        project.stages,
        project.states,
        found,
        machines=machines,
        num_rows=args.rows,
        assumed=_assumptions(args.assume, list(project.stages)),
    )
    memory = _memory(project, machines)
    hours, unknown_hours = total(estimates, "worker_hours")
    price, unknown_prices = total(estimates, "price")
    month = storage_price(estimates, machines)
    if args.json:
        summary = {
            "stages": [item.to_json() for item in estimates],
            "worker_hours": hours,
            "stages_of_unknown_hours": unknown_hours,
            "price": price,
            "stages_of_unknown_price": unknown_prices,
            "currency": machines.currency if machines else None,
            "storage_price_per_month": month,
            "memory_per_rank_bytes": {name: dataclasses.asdict(rank) for name, rank in memory.chosen.items()},
            "memory_by_way_bytes": {name: [way.to_json() for way in ways] for name, ways in memory.ways.items()},
        }
        print_json(summary)
        return 0
    _print(estimates, machines)
    for name, rank in memory.chosen.items():
        print(memory_line(name, rank))
    if memory.ways:
        configs = {name: cast("GeneratorTraining", project.stages[name].config) for name in memory.ways}
        open_console(sys.stdout).print(ways_table(memory.ways, configs, memory.limit_gib))
        print(legend(memory.limit_gib))
    currency = machines.currency if machines else ""
    print(f"work: {hours:,.3g} worker hours{_but(unknown_hours)}")
    priced = unknown_prices < sum(item.status == "pending" for item in estimates)
    print(f"price: {price:,.2f} {currency}{_but(unknown_prices)}" if priced else "price: unknown; see --prices")
    if month is not None:
        print(f"store: {month:,.2f} {currency} per month")
    return 0


@dataclass(frozen=True)
class _Memory:
    """What ranks take: of each training that is still to run, as configured and in all ways; and what a GPU has."""

    chosen: dict[str, RankMemory]
    ways: dict[str, list[Way]]
    limit_gib: float | None


def _memory(project: Project, machines: PriceTable | None) -> _Memory:
    """Estimate the trainings that are still to run; refuse those that do not fit the GPUs of the table."""
    from cluster.memory_plan import RankMemories, clip_text_bytes
    from cluster.memory_ways import check_fits, ways
    from stages.generator_config import GeneratorTraining

    limit = machines.gpu.gpu_memory_gib if machines and machines.gpu else None
    found = _Memory({}, {}, limit)
    for name, stage in project.stages.items():
        config = stage.config
        if not isinstance(config, GeneratorTraining) or project.states[name].manifest is not None:
            continue
        memories = RankMemories(clip_text_bytes(project.config.clip))
        if limit is None or not config.gpus_per_rank:
            found.chosen[name] = memories.of(config)
        else:
            found.chosen[name] = check_fits(config, limit, name, memories)
        found.ways[name] = ways(config, memories)
    return found


def _but(num_unknown: int) -> str:
    return (
        f", without {num_unknown} stage{'s' if num_unknown > 1 else ''} of which it is not known" if num_unknown else ""
    )


def _assumptions(given: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        stage, _, value = text.partition("=")
        try:
            found[stage] = float(value)
        except ValueError:
            found[stage] = 0.0
        if stage not in names or not 0 < found[stage] < float("inf"):
            raise ConfigError(f"--assume {text}: write STAGE=SAMPLES_PER_S, for example embed=120")
    return found


def _print(estimates: Sequence[StageEstimate], machines: PriceTable | None) -> None:
    table = new_table(
        *("stage", "status", "samples in", "samples kept", "shards", "store", "workers", "time", "price"),
        "known from",
    )
    for item in estimates:
        most = "≤ " if item.at_most else ""
        done = item.status == "done"
        table.add_row(
            item.stage,
            f"[{'green' if done else 'yellow'}]{item.status}[/]",
            _UNKNOWN if item.num_in is None else f"{most}{item.num_in:,}",
            _UNKNOWN if item.num_kept is None else f"{most}{item.num_kept:,}",
            _UNKNOWN if item.num_shards is None else f"{item.num_shards:,}",
            _UNKNOWN if item.num_bytes is None else bytes_text(item.num_bytes),
            "" if done else _UNKNOWN if item.num_workers is None else f"{item.num_workers:,}",
            "" if done else _UNKNOWN if item.hours is None else format_duration(item.hours * 3600),
            "" if done else _UNKNOWN if item.price is None else f"{item.price:,.2f}",
            item.basis.partition(";")[0],
        )
    open_console(sys.stdout).print(table)
    for item in estimates:
        if item.basis.startswith("unknown"):
            print(f"{item.stage}: {item.basis}")
