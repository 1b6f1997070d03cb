"""What other thresholds would keep, from the measurements in the store: no image is read and nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.base import Affects, Stage, identity_of
from stages.curate import Curate
from stages.errors import ConfigError, InputError
from stages.filter import Filter
from stages.manifest import Manifest, ShardRecord
from stages.samples import table_from_bytes

_DECIDING = ("filter", "curate")

Mask = npt.NDArray[np.bool_]


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
    passed = {
        record.inputs["images"].sha256: _kept_keys(manifests["filter"], record, reasons)
        for record, reasons in zip(filter_records, filter_reasons, strict=True)
    }
    among = [_is_in(_keys(manifests["curate"], r, "scores"), passed[r.inputs["images"].sha256]) for r in curate_records]
    curate_reasons = [reason for part in curate.decide(curate_records, np.concatenate(among)) for reason in part]
    now = np.concatenate([_kept(manifests["curate"], record) for record in curate_records])
    then = np.array([reason is None for reason in curate_reasons], bool)
    found = {
        "filter": Counter(reason for part in filter_reasons for reason in part if reason is not None),
        "curate": Counter(reason for reason in curate_reasons if reason not in (None, "left_out")),
    }
    num_known = sum(
        int(_is_in(_keys(manifests["embed"], record, "selection"), passed[record.inputs["images"].sha256]).sum())
        for record in manifests["embed"].records
    )
    return WhatIf(
        dropped={
            name: {
                reason: (manifests[name].dropped.get(reason, 0), found[name].get(reason, 0))
                for reason in sorted({*manifests[name].dropped, *found[name]})
            }
            for name in _DECIDING
        },
        kept=(int(now.sum()), int(then.sum())),
        not_embedded=sum(len(keys) for keys in passed.values()) - num_known,
        gained=int((then & ~now).sum()),
        lost=int((now & ~then).sum()),
    )


def _refuse_other_measurements(stages: Mapping[str, Stage[Any]], changed: Mapping[str, Stage[Any]]) -> None:
    # What comes after curate decides nothing, and is another training where its start would be another version.
    read = _read_by(stages, "curate")
    for name, stage in stages.items():
        if name not in read:
            continue
        # Of the deciding stages, only what their measurements are made with must stay.
        scopes: Sequence[Affects] = ("shard",) if name in _DECIDING else ("shard", "stage")
        if identity_of(stage.config, scopes) != identity_of(changed[name].config, scopes):
            raise ConfigError(
                f"what-if: the change touches what {name} measures or makes; only thresholds of filter and curate can "
                "be tried from stored scores: `unclip run` with the change makes the rest"
            )


def _read_by(stages: Mapping[str, Stage[Any]], name: str) -> set[str]:
    """Return a stage and all it is made from."""
    return {name}.union(*(_read_by(stages, upstream) for upstream in stages[name].upstream))


def _keys(manifest: Manifest, record: ShardRecord, role: str) -> pa.Array:
    table = table_from_bytes(record.files[role].read(manifest.root), ["key"])
    return table["key"].combine_chunks()


def _kept_keys(manifest: Manifest, record: ShardRecord, reasons: Sequence[str | None]) -> pa.Array:
    return _keys(manifest, record, "scores").filter(pa.array([reason is None for reason in reasons], pa.bool_()))


def _kept(manifest: Manifest, record: ShardRecord) -> Mask:
    table = table_from_bytes(record.files["selection"].read(manifest.root), ["kept"])
    return np.asarray(table["kept"].to_numpy(), bool)


def _is_in(keys: pa.Array, others: pa.Array) -> Mask:
    return np.asarray(pc.is_in(keys, value_set=others).to_numpy(zero_copy_only=False), bool)
