"""What other thresholds would keep, from the measurements in the store: no image is read and nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.base import Stage, identity_of
from stages.curate import Curate
from stages.errors import ConfigError, InputError
from stages.filter import Filter
from stages.manifest import Manifest, ShardRecord
from stages.samples import table_from_bytes

_DECIDING = ("filter", "curate")


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What a change of rules would do.

    Attributes:
        dropped: stage -> reason -> samples dropped (as it is, as it would be).
        kept: samples kept in the end (as it is, as it would be).
        not_embedded: samples that the filter would now keep and that have no embedding yet; a run would embed them, and
            curate would decide about them, so they are not in ``kept``.
        gained: samples kept that are dropped now.
        lost: samples dropped that are kept now.
    """

    dropped: Mapping[str, Mapping[str, tuple[int, int]]]
    kept: tuple[int, int]
    not_embedded: int
    gained: int
    lost: int


def what_if(
    stages: Mapping[str, Stage[Any]], changed: Mapping[str, Stage[Any]], manifests: Mapping[str, Manifest]
) -> WhatIf:
    """Decide anew with changed rules.

    Args:
        stages: of the pipeline as it is.
        changed: of the pipeline with the change.
        manifests: of the pipeline as it is; the data stages at least.

    Raises:
        InputError: if the data stages have not finished.
        ConfigError: if the change needs other measurements than those in the store.
    """
    missing = [name for name in ("download", "filter", "embed", "curate") if name not in manifests]
    if missing:
        raise InputError(f"what-if: {missing[0]} has not finished; run it first (unclip run --until curate)")
    _refuse_other_measurements(stages, changed)
    filter_, curate = changed["filter"], changed["curate"]
    assert isinstance(filter_, Filter) and isinstance(curate, Curate)
    filter_records, curate_records = manifests["filter"].records, manifests["curate"].records
    filter_reasons = filter_.decide(filter_records)
    passed = _kept_keys(manifests["filter"], filter_records, filter_reasons)
    embedded = [key for record in curate_records for key in _keys(manifests["curate"], record)]
    among = np.array([key in passed for key in embedded], bool)
    curate_reasons = [reason for part in curate.decide(curate_records, among) for reason in part]
    now = _kept_now(manifests["curate"])
    then = {key for key, reason in zip(embedded, curate_reasons, strict=True) if reason is None}
    found = {
        "filter": Counter(reason for part in filter_reasons for reason in part if reason is not None),
        "curate": Counter(reason for reason in curate_reasons if reason not in (None, "left_out")),
    }
    undecodable = sum(manifests["embed"].dropped.values())
    return WhatIf(
        dropped={
            name: {
                reason: (manifests[name].dropped.get(reason, 0), found[name].get(reason, 0))
                for reason in sorted({*manifests[name].dropped, *found[name]})
            }
            for name in _DECIDING
        },
        kept=(len(now), len(then)),
        not_embedded=max(0, len(passed) - int(among.sum()) - undecodable),
        gained=len(then - now),
        lost=len(now - then),
    )


def _refuse_other_measurements(stages: Mapping[str, Stage[Any]], changed: Mapping[str, Stage[Any]]) -> None:
    for name, stage in stages.items():
        # Of the deciding stages, only what their measurements are made with must stay.
        scopes = ("shard",) if name in _DECIDING else ("shard", "stage")
        if identity_of(stage.config, scopes) != identity_of(changed[name].config, scopes):
            raise ConfigError(
                f"what-if: the change touches what {name} measures or makes; only thresholds of filter and curate can be "
                "tried from stored scores: `unclip run` with the change makes the rest"
            )


def _keys(manifest: Manifest, record: ShardRecord) -> list[str]:
    return list(table_from_bytes(record.files["scores"].read(manifest.root), ["key"])["key"].to_pylist())


def _kept_keys(manifest: Manifest, records: Sequence[ShardRecord], reasons: Sequence[Sequence[str | None]]) -> set[str]:
    return {
        key
        for record, part in zip(records, reasons, strict=True)
        for key, reason in zip(_keys(manifest, record), part, strict=True)
        if reason is None
    }


def _kept_now(manifest: Manifest) -> set[str]:
    found: set[str] = set()
    for record in manifest.records:
        table = table_from_bytes(record.files["selection"].read(manifest.root), ["key", "kept"])
        found.update(table.filter(table["kept"])["key"].to_pylist())
    return found
