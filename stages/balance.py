"""Balance between stages: the samples that come in are the samples kept upstream, none lost and none twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stages.errors import IntegrityError
from stages.manifest import Manifest, ShardRecord


@dataclass
class _Tally:
    """What the shards made from one upstream shard count."""

    first: str
    num_in: int = 0


def check_balance(
    stage: str,
    records: Sequence[ShardRecord],
    upstream: Manifest,
    *,
    planned: Mapping[str, Iterable[str]],
    quarantined: Iterable[str] = (),
) -> None:
    """Compare what a stage took in with what its upstream stage kept, as a whole and shard by shard.

    Args:
        stage: its name, for messages.
        records: its final records.
        upstream: the stage whose kept samples are counted.
        planned: shard id -> paths of the files it reads, of all shards of the plan. Shards that read files of one
            upstream shard alone must together take in what that one kept.
        quarantined: shards given up on; what their upstream shards kept is not expected.

    Raises:
        IntegrityError: names the stage, the numbers and the first shard that differs.
    """
    owner = {file.path: i for i, record in enumerate(upstream.records) for file in record.files.values()}
    sources = {shard: {owner[path] for path in paths if path in owner} for shard, paths in planned.items()}
    missing = {i for shard in quarantined for i in sources.get(shard, ())}
    tallies: dict[int, _Tally] = {}
    for record in records:
        found = sources.get(record.shard_id, set())
        if len(found) == 1:
            tally = tallies.setdefault(next(iter(found)), _Tally(record.shard_id))
            tally.num_in += record.num_in
    # A shard that was to try rows of another again is given up on alone: the other one counts them all.
    missing -= {i for i, tally in tallies.items() if tally.num_in == upstream.records[i].num_kept}
    first = ""
    for i, tally in tallies.items():
        kept = upstream.records[i].num_kept
        if i not in missing and tally.num_in != kept:
            first = (
                f"first shard: {tally.first} with {tally.num_in} in, made from {upstream.stage} shard "
                f"{upstream.records[i].shard_id} with {kept} kept; "
            )
            break
    num_in = sum(record.num_in for record in records)
    expected = sum(record.num_kept for i, record in enumerate(upstream.records) if i not in missing)
    if first or num_in != expected:
        raise IntegrityError(
            f"{stage}: {num_in} samples in, but {upstream.stage} kept {expected}; {first}"
            f"run again with --force {stage}; if it stays, with --force {upstream.stage}"
        )
