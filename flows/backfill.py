"""Backfill: process the lists of past days, one day after the other, so that later runs find their shards done.

A day is processed by itself, up to the embeddings: shards are identified by what is in them, so whatever run comes
later takes them over. What looks at the data set as a whole - near duplicates across days, curation, the trainings -
is for that run, with all lists.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flows.prefect_server import PrivateServer, user_api_url
from flows.project import Project, open_project
from flows.selection import Selection
from stages.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The lists of one day.

    Attributes:
        date: the day.
        lists: their names.
        overrides: settings that select them.
        project: the pipeline over these lists alone.
        selection: the stages to bring to their end.
    """

    date: datetime.date
    lists: Sequence[str]
    overrides: Sequence[str]
    project: Project
    selection: Selection

    @property
    def pending(self) -> list[str]:
        """Stages that are not done."""
        return [name for name in self.selection.stages if self.project.states[name].status != "done"]


def find_partitions(
    config_path: str, overrides: Sequence[str], *, first: str | None = None, last: str | None = None
) -> list[Partition]:
    """Find the days that the lists are of, with what the store holds of them; runs nothing.

    Args:
        config_path: the config file.
        overrides: ``dotted.key=value``.
        first: leave out earlier days, YYYY-MM-DD.
        last: leave out later days.

    Raises:
        InputError: if no list is of such a day.
        ConfigError: if the config or a date is wrong.
    """
    from stages.config import load_config
    from stages.source import Source

    bounds = [f"source.{name}={date}" for name, date in (("since", first), ("until", last)) if date is not None]
    config = load_config(config_path, [*overrides, *bounds])
    by_date = Source(config.source, root=config.root).partitions()
    found = [
        _partition(config_path, [*overrides, f"source.since={date}", f"source.until={date}"], date, names)
        for date, names in by_date.items()
        if date is not None
    ]
    if not found:
        raise InputError(
            f"backfill: no list of source.lists is of a day from {first or 'ever'} to {last or 'now'}; days are told "
            "by names such as 2026-11-08/urls.parquet, inside the folder that source.lists names"
        )
    return found


def _partition(config_path: str, overrides: Sequence[str], date: datetime.date, lists: Sequence[str]) -> Partition:
    project = open_project(config_path, overrides)
    # A CLIP that is trained on the data makes embeddings that hold for those data alone.
    last = "filter" if project.stages["clip"].upstream else "embed"
    names = tuple(project.stages)
    selection = Selection(names[: names.index(last) + 1])
    return Partition(date=date, lists=lists, overrides=overrides, project=project, selection=selection)


def backfill(
    partitions: Sequence[Partition], bring_to_end: Callable[[Partition], int]
) -> Iterator[tuple[Partition, int]]:
    """Process days in order, and stop at the first that does not come to its end.

    Args:
        partitions: from ``find_partitions``.
        bring_to_end: runs the stages of one; returns an exit code.

    Yields:
        Every day that had to be processed, with its exit code.
    """
    pending = [partition for partition in partitions if partition.pending]
    with _one_server() if pending else contextlib.nullcontext():
        for partition in pending:
            code = bring_to_end(partition)
            yield partition, code
            if code:
                return


@contextlib.contextmanager
def _one_server() -> Iterator[None]:
    """Keep one private Prefect server for all days; starting it takes longer than a day with few rows."""
    if user_api_url():
        yield
        return
    with PrivateServer() as server:
        server.wait()  # until then nobody else can use it
        yield
