"""Ledger: every row of the lists in exactly one terminal state, as Parquet that any query engine reads.

A row is kept, or it was dropped by one stage for one reason, with the numbers that stage looked at and the version of
its rules. The ledger is assembled from the tables in which the stages name every sample they were given; each part
belongs to one download shard, is named by what it was made from and never rewritten, so an appended list appends parts.

Nothing is taken on trust: a row without a verdict, a verdict about an unknown row, or counts that differ from those in
the records of the stages are errors.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from stages.base import Result, Shard, Stage, setting
from stages.errors import IntegrityError
from stages.manifest import File, Manifest, ShardRecord
from stages.retries import RETRIED
from stages.samples import row_keys, table_from_bytes, table_to_bytes

KEPT = "kept"
QUARANTINED = "quarantined"  # reason of all rows of a shard that a stage gave up on
# The stages that decide about samples, in order, and the role of the table in which each names all it was given.
DECIDING: Mapping[str, str] = {
    "download": "table",
    "filter": "selection",
    "embed": "selection",
    "curate": "selection",
}
DATA_STAGES: tuple[str, ...] = ("source", *DECIDING)
_IDENTITY = ("key", "list", "row", "url", "caption")
_NOT_A_SCORE = {*_IDENTITY, "kept", "status", "reason", "rule_version"}
# Of the download's table: what it measured. Its other columns are the user's own.
_DOWNLOAD_SCORES = ("width", "height", "original_width", "original_height", "sha256")


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """What the ledger says of a row beside its state."""

    scores: bool = setting(True, "add the numbers that the deciding stage looked at, as JSON")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one stage decided about one sample.

    Attributes:
        stage: the stage.
        reason: why it dropped the sample; None if it kept it.
        rule_version: of the stage's rules.
        scores: what it looked at.
    """

    stage: str
    reason: str | None
    rule_version: int | None
    scores: Mapping[str, Any]


class Ledger(Stage[LedgerConfig]):
    """One part per download shard; see the module's docstring."""

    name: ClassVar[str] = "ledger"

    @property
    def upstream(self) -> tuple[str, ...]:
        """The rows, and all stages that decide about them."""
        return ("source", *DECIDING)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Plan one shard per download shard, with the tables of the deciding stages about it.

        Rows of a shard that the download gave up on are known from the source alone.
        """
        parts = list(tables_of(inputs).values())
        downloaded = {record.inputs["urls"].sha256 for record in inputs["download"].records}
        urls = [record.files["urls"] for record in inputs["source"].records]
        parts += [{"urls": file} for file in urls if file.sha256 not in downloaded]
        return [self.shard(index, inputs=tables) for index, tables in enumerate(parts)]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Write the terminal state of every row of one download shard.

        Raises:
            IntegrityError: if the tables contradict each other.
        """
        started_at = time.monotonic()
        tables = {stage: table_from_bytes(file.read(self.root)) for stage, file in shard.inputs.items()}
        if "urls" in tables:
            keys = row_keys(shard.inputs["urls"].sha256, tables["urls"].num_rows)
            tables = {"rows": tables["urls"].append_column("key", pa.array(keys, pa.string()))}
        states = terminal_states(tables)
        if not self.config.scores:
            states = states.drop_columns(["scores"])
        fates = zip(states["stage"].to_pylist(), states["reason"].to_pylist(), strict=True)
        dropped = Counter(f"{stage}: {reason}" for stage, reason in fates if reason is not None)
        return self.commit(
            shard,
            output,
            {"ledger": ("parquet", table_to_bytes(states))},
            started_at=started_at,
            num_in=states.num_rows,
            num_kept=states.num_rows - dropped.total(),
            dropped=dropped,
        )

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Hold the ledger against what every stage counted.

        Raises:
            IntegrityError: if a number differs.
        """
        found: Counter[str] = Counter()
        for record in records:
            found.update(record.dropped)
        counted = {f"{stage}: {reason}": count for stage in DECIDING for reason, count in inputs[stage].dropped.items()}
        num_rows = sum(record.num_in for record in records)
        num_kept = sum(record.num_kept for record in records)
        counted |= {"rows": inputs["source"].num_kept, KEPT: inputs["curate"].num_kept}
        for before, stage in pairwise(DATA_STAGES):
            if inputs[stage].quarantined:
                counted[f"{stage}: {QUARANTINED}"] = inputs[before].num_kept - inputs[stage].num_in
        in_ledger = {**found, "rows": num_rows, KEPT: num_kept}
        if different := sorted(
            name for name in counted.keys() | in_ledger if counted.get(name, 0) != in_ledger.get(name, 0)
        ):
            name = different[0]
            raise IntegrityError(
                f"ledger: {in_ledger.get(name, 0)} rows of '{name}' where the stages counted {counted.get(name, 0)}; "
                "run `unclip verify` to find what is damaged"
            )
        return Result(records=records, metrics={"num_rows": num_rows, "num_kept": num_kept})


def tables_of(manifests: Mapping[str, Manifest]) -> dict[str, dict[str, File]]:
    """Find the tables about every download shard, as far as the pipeline has come.

    Returns:
        id of the download shard -> deciding stage -> its table; and, of rows that were tried again, the table they are
        in now, as ``retried``.
    """
    downloads = manifests["download"].records
    by_table = {record.files["table"].sha256: record.shard_id for record in downloads}
    by_images = {record.files["images"].sha256: record.shard_id for record in downloads}
    found = {record.shard_id: {"download": record.files["table"]} for record in downloads}
    for record in downloads:
        if RETRIED in record.files:
            found[record.shard_id][RETRIED] = record.files[RETRIED]
    for stage, role in list(DECIDING.items())[1:]:
        if stage not in manifests:
            break
        for record in manifests[stage].records:
            table = record.inputs.get("table")
            owner = by_table[table.sha256] if table is not None else by_images[record.inputs["images"].sha256]
            found[owner][stage] = record.files[role]
    return found


def verdicts_of(tables: Mapping[str, pa.Table], key: str) -> list[Verdict]:
    """List what the stages decided about one sample, in order.

    Args:
        tables: deciding stage -> its table about the shard of the sample, as far as the pipeline has come.
        key: the sample.
    """
    found = []
    for stage in DECIDING:
        rows = tables[stage].filter(pc.equal(tables[stage]["key"], key)).to_pylist() if stage in tables else []
        for row in rows:
            version = row.get("rule_version")
            found.append(Verdict(stage=stage, reason=row["reason"], rule_version=version, scores=_scores(stage, row)))
    return found


def _scores(stage: str, row: Mapping[str, Any]) -> dict[str, Any]:
    names = _DOWNLOAD_SCORES if stage == "download" else [name for name in row if name not in _NOT_A_SCORE]
    # Raw bytes are for machines: they stay in the stage's own table.
    return {name: row[name] for name in names if row[name] is not None and not isinstance(row[name], bytes)}


def terminal_states(tables: Mapping[str, pa.Table]) -> pa.Table:
    """Join the tables about one download shard to the terminal state of every row.

    Args:
        tables: ``download``, ``filter``, ``embed`` and ``curate`` -> its table, as far as no stage gave up on the
            shard; ``retried``: the table of rows that another part is about; ``rows``: instead of all, the mere rows.

    Returns:
        One line per row, in the order of the list: ``key``, ``list``, ``row``, ``url``, ``caption``, ``state``
        (``kept`` or ``dropped``), ``stage`` and ``reason`` (of the drop; null when kept), ``rule_version``, ``scores``
        (JSON).

    Raises:
        IntegrityError: if a row has no verdict or a verdict no row.
    """
    rows = tables["rows" if "rows" in tables else "download"]
    if RETRIED in tables:
        rows = rows.filter(pc.invert(pc.is_in(rows["key"], value_set=tables[RETRIED]["key"].combine_chunks())))
    expected: list[str] = rows["key"].to_pylist()
    if len(set(expected)) != len(expected):
        raise IntegrityError("ledger: the download's table names a sample twice; run again with --force download")
    fates: dict[str, tuple[str | None, str | None, int | None, str]] = {}
    for stage in DECIDING:
        if stage not in tables:
            fates |= dict.fromkeys(expected, (stage, QUARANTINED, None, "{}"))
            break
        # A shard of which nothing is left is not handed on.
        lines = (rows if stage == "download" else tables[stage]).to_pylist() if expected else []
        if [line["key"] for line in lines] != expected:
            raise IntegrityError(
                f"ledger: {stage} was given {len(expected)} samples of a shard, its table names {len(lines)}, or "
                f"others; run again with --force {stage}"
            )
        for line in lines:
            if line["reason"] is not None or stage == "curate":
                place = stage if line["reason"] is not None else None
                scores = json.dumps(_scores(stage, line), sort_keys=True, default=str)
                fates[line["key"]] = (place, line["reason"], line.get("rule_version"), scores)
        expected = [line["key"] for line in lines if line["reason"] is None]
    states = [fates[key] for key in rows["key"].to_pylist()]
    return pa.table(
        {
            **{name: rows[name] for name in _IDENTITY},
            "state": pa.array([KEPT if stage is None else "dropped" for stage, *_ in states], pa.string()),
            "stage": pa.array([stage for stage, *_ in states], pa.string()),
            "reason": pa.array([reason for _, reason, *_ in states], pa.string()),
            "rule_version": pa.array([version for *_, version, _ in states], pa.int64()),
            "scores": pa.array([scores for *_, scores in states], pa.string()),
        }
    )
