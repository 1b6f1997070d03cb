"""Curate stage: CLIP scores -> the final selection that every training reads.

The shards only collect scores. The thresholds are applied to the whole dataset at the end, so changing one costs no
embedding and no pass over images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages import storage
from stages.base import Result, Shard, Stage, setting
from stages.errors import InputError, IntegrityError
from stages.manifest import Manifest, ShardRecord
from stages.samples import selection_table, table_from_bytes, table_to_bytes

_IO_THREADS = 16
_QUANTILES = (1, 5, 25, 50, 75, 95, 99)
KEPT, BELOW_MIN, BELOW_FRACTION = 0, 1, 2
_REASONS: dict[int, str | None] = {KEPT: None, BELOW_MIN: "clip_score_min", BELOW_FRACTION: "keep_fraction"}

Scores = npt.NDArray[np.float32]
Verdicts = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Which embedded samples are trained on."""

    clip_score_min: float | None = setting(
        None, "lowest cosine of image and caption embedding; null: no limit", affects="stage"
    )
    keep_fraction: float = setting(
        1.0, "share of the samples above clip_score_min to keep, best CLIP scores first, 0 to 1", affects="stage"
    )

    def __post_init__(self) -> None:
        if self.clip_score_min is not None and not -1 <= self.clip_score_min <= 1:
            raise ValueError(
                f"clip_score_min: {self.clip_score_min} is no cosine; write a number from -1 to 1, or null"
            )
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction: {self.keep_fraction} is not above 0 and at most 1; write 1 to keep all")


class Curate(Stage[CurateConfig]):
    """Collect scores shard by shard, then decide over all of them."""

    name = "curate"
    counts = "embed"

    @property
    def upstream(self) -> tuple[str, ...]:
        """The embeddings."""
        return ("embed",)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Plan one shard per shard of the embed stage."""
        return [
            self.shard(i, inputs={"images": r.inputs["images"], "embeddings": r.files["embeddings"]})
            for i, r in enumerate(inputs["embed"].records)
        ]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Extract the scores of one shard."""
        started_at = time.monotonic()
        scores = table_from_bytes(shard.inputs["embeddings"].read(self.root), ["key", "clip_score"])
        return self.commit(
            shard,
            output,
            {"scores": ("scores.parquet", table_to_bytes(scores))},
            started_at=started_at,
            num_in=scores.num_rows,
            num_kept=scores.num_rows,
        )

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Apply the thresholds to the whole dataset and write every shard's selection.

        Raises:
            InputError: if nothing is left.
        """
        with ThreadPoolExecutor(_IO_THREADS) as pool:
            scores = list(pool.map(self._scores, records))
            every = np.concatenate([np.zeros(0, np.float32), *scores])
            verdicts = judge(every, self.config)
            if not (verdicts == KEPT).any():
                raise InputError(self._nothing_left(every, verdicts))
            parts = np.split(verdicts, np.cumsum([len(s) for s in scores])[:-1])
            selected = list(
                pool.map(lambda pair: self._select(pair[0], pair[1], output), zip(records, parts, strict=True))
            )
        kept = every[verdicts == KEPT]
        metrics = {
            "clip_score_mean": float(every.mean(dtype=np.float64)),
            "clip_score_mean_kept": float(kept.mean(dtype=np.float64)),
            "clip_score_min_kept": float(kept.min()),
            **{f"clip_score_p{q:02d}": float(np.percentile(every, q)) for q in _QUANTILES},
        }
        return Result(records=selected, metrics=metrics)

    def _scores(self, record: ShardRecord) -> Scores:
        table = table_from_bytes(record.files["scores"].read(self.root), ["clip_score"])
        if table.num_rows != record.num_in:
            raise IntegrityError(
                f"{self.uri(record.files['scores'])}: {table.num_rows} scores where the record says {record.num_in}; "
                "run curate again with --force"
            )
        return np.asarray(table["clip_score"].to_numpy(), np.float32)

    def _select(self, record: ShardRecord, verdicts: Verdicts, output: str) -> ShardRecord:
        """Publish one shard's selection and return its final record."""
        table = table_from_bytes(record.files["scores"].read(self.root))
        reasons = [_REASONS[int(verdict)] for verdict in verdicts]
        scores: dict[str, pa.ChunkedArray] = {"clip_score": table["clip_score"]}
        selection = selection_table(table["key"].to_pylist(), reasons, scores)
        file = self.publish(storage.join(output, f"{record.shard_id}.selection.parquet"), table_to_bytes(selection))
        dropped = {str(_REASONS[v]): int((verdicts == v).sum()) for v in (BELOW_MIN, BELOW_FRACTION)}
        return replace(
            record,
            files={**record.files, "selection": file},
            num_kept=int((verdicts == KEPT).sum()),
            dropped={reason: count for reason, count in dropped.items() if count},
        )

    def _nothing_left(self, scores: Scores, verdicts: Verdicts) -> str:
        if not len(scores):
            return "curate: no embedded sample came in; see what `unclip status` says of embed and filter"
        return (
            f"curate: nothing is left: {len(scores)} samples came in and curate.clip_score_min: "
            f"{self.config.clip_score_min} dropped all of them (their CLIP scores lie between {scores.min():.4f} and "
            f"{scores.max():.4f}, half of them above {np.median(scores):.4f}); lower it, or use curate.keep_fraction"
        )


def judge(scores: Scores, config: CurateConfig) -> Verdicts:
    """Decide over all samples of a dataset.

    Samples below ``clip_score_min`` go first. Of the n others, the ``ceil(keep_fraction * n)`` best stay; of equal
    scores the earlier in the dataset's order.

    Args:
        scores: CLIP scores in the order of the dataset, float32 ``(N,)``.
        config: the thresholds.

    Returns:
        ``KEPT``, ``BELOW_MIN`` or ``BELOW_FRACTION`` of every sample, int8 ``(N,)``.
    """
    verdicts = np.full(len(scores), KEPT, np.int8)
    if config.clip_score_min is not None:
        verdicts[scores < config.clip_score_min] = BELOW_MIN
    remaining = np.flatnonzero(verdicts == KEPT)
    # 0.1 * 30 is a little more than 3 in binary; that must not keep a fourth sample.
    num_kept = math.ceil(config.keep_fraction * len(remaining) - 1e-9)
    best_first = remaining[np.argsort(-scores[remaining], kind="stable")]
    verdicts[best_first[num_kept:]] = BELOW_FRACTION
    return verdicts
