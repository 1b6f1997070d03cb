"""Curate stage: scores of embedded samples -> the final selection that every training reads.

The shards only collect scores: CLIP score, and how much of each unwanted concept an image shows. The thresholds are
applied to the whole data set at the end, so changing one costs no embedding and no pass over images.

Like the filter's, the decision depends on the samples and their rank alone (``stages/ranks.py``).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages import storage
from stages.base import Result, Shard, Stage, setting
from stages.concepts import NAME, Concept, Head, ZeroShot, head_sums, load_heads, load_zero_shot, score_concepts
from stages.errors import InputError, IntegrityError
from stages.keeper_keys import KeeperKeys
from stages.keepers import NONE, Rows
from stages.manifest import Manifest, ShardRecord
from stages.ranks import Ranks, in_given_order, parts_of
from stages.samples import embeddings_of, selection_table, table_from_bytes, table_to_bytes
from stages.semantic_duplicates import Embeddings, semantic_duplicates
from stages.weights import weights_of

RULE_VERSION = 2  # of what the rules mean; raised whenever equal settings would decide otherwise
REASONS = ("clip_score_min", "concept_<name>", "semantic_duplicate", "keep_fraction")
KEPT, LEFT_OUT = -1, -2
_IO_THREADS = 16
_FINISH_BYTES = 30  # per sample; concepts come on top
_QUANTILES = (1, 5, 25, 50, 75, 95, 99)

Scores = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Which embedded samples are trained on."""

    clip_score_min: float | None = setting(
        None, "lowest cosine of image and caption embedding; null: no limit", affects="stage"
    )
    concepts: Mapping[str, Concept] = setting(
        factory=dict, help="unwanted concepts by name: prompts and against, or head; and max, the highest score kept"
    )
    semantic_duplicate_cosine: float | None = setting(
        None, "cosine from which two image embeddings count as the same image; null: off", affects="stage"
    )
    keep_fraction: float = setting(
        1.0, "share to keep of the samples that pass all other rules, best CLIP scores first, 0 to 1", affects="stage"
    )

    def __post_init__(self) -> None:
        if self.clip_score_min is not None and not -1 <= self.clip_score_min <= 1:
            raise ValueError(
                f"clip_score_min: {self.clip_score_min} is no cosine; write a number from -1 to 1, or null"
            )
        if self.semantic_duplicate_cosine is not None and not 0 < self.semantic_duplicate_cosine <= 1:
            raise ValueError(
                f"semantic_duplicate_cosine: {self.semantic_duplicate_cosine} is not above 0 and at most 1; write for "
                "example 0.95, or null"
            )
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction: {self.keep_fraction} is not above 0 and at most 1; write 1 to keep all")
        wrong = next((name for name in self.concepts if not NAME.fullmatch(name)), None)
        if wrong is not None:
            raise ValueError(f"concepts: '{wrong}' is no name; write lower-case letters, digits and _")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reason codes in the order in which the rules apply."""
        concepts = (f"concept_{name}" for name in sorted(self.concepts))
        return ("clip_score_min", *concepts, "semantic_duplicate", "keep_fraction")


@dataclass(frozen=True)
class Verdicts:
    """The decision on n samples.

    Attributes:
        codes: position in ``CurateConfig.reasons``, ``KEPT`` or ``LEFT_OUT``; int16 ``(n,)``.
        keepers: of semantic duplicates, the row that keeps them out, else ``NONE``; int64 ``(n,)``.
    """

    codes: Codes
    keepers: Rows


class Curate(Stage[CurateConfig]):
    """Collect scores shard by shard, then decide over all of them."""

    name = "curate"
    counts = "embed"
    version = RULE_VERSION

    def __init__(self, config: CurateConfig, *, root: str, seed: int = 0) -> None:
        super().__init__(config, root=root, seed=seed)
        self._loaded: tuple[Any, dict[str, Head | ZeroShot]] | None = None

    @property
    def _has_prompts(self) -> bool:
        return any(concept.head is None for concept in self.config.concepts.values())

    @property
    def upstream(self) -> tuple[str, ...]:
        """The embeddings; and the CLIP that embeds the prompts of concepts."""
        return ("embed", "clip") if self._has_prompts else ("embed",)

    def external(self) -> Any:
        """Identify the heads of concepts by content.

        Raises:
            InputError: if a file is missing.
        """
        return head_sums(self.config.concepts) or None

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Plan one shard per shard of the embed stage.

        Raises:
            InputError: if the file of a head is missing.
        """
        sums = head_sums(self.config.concepts)
        params = {"heads": sums} if sums else {}
        weights = {"weights": weights_of(inputs["clip"])} if self._has_prompts else {}
        return [
            self.shard(
                i,
                inputs={
                    "images": r.inputs["images"],
                    "selection": r.inputs["selection"],
                    "embeddings": r.files["embeddings"],
                    **weights,
                },
                **params,
            )
            # Shards of which nothing was embedded are all alike.
            for i, r in enumerate(record for record in inputs["embed"].records if record.num_kept)
        ]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Collect the scores of one shard, and the rank of its samples.

        Raises:
            IntegrityError: if a sample was embedded that the filter does not know.
        """
        started_at = time.monotonic()
        columns = ["key", "clip_score", *(["image_embedding"] if self.config.concepts else [])]
        table = table_from_bytes(shard.inputs["embeddings"].read(self.root), columns)
        scores = {"key": table["key"], **self._origin(shard, table["key"]), "clip_score": table["clip_score"]}
        if self.config.concepts:
            images = embeddings_of(table, "image_embedding")
            found = score_concepts(self._scorers(shard, images.shape[1]), sorted(self.config.concepts), images)
            scores |= {f"concept_{name}": pa.array(values) for name, values in found.items()}
        return self.commit(
            shard,
            output,
            {"scores": ("scores.parquet", table_to_bytes(pa.table(scores)))},
            started_at=started_at,
            num_in=table.num_rows,
            num_kept=table.num_rows,
        )

    def decide(
        self, records: Sequence[ShardRecord], among: npt.NDArray[np.bool_] | None = None
    ) -> list[list[str | None]]:
        """Say why each sample of each shard is dropped, None where it is kept; writes nothing to the store.

        Args:
            records: of the shards that ``process`` scored.
            among: which samples to decide about, as if the others had never come, bool ``(n,)``; all by default.

        Returns:
            The reasons of every shard, in the order of ``records`` and of the samples in them; ``left_out`` for those
            not decided about.
        """
        _, verdicts = self._decided(records, among)
        return [self._reasons(verdicts.codes[part]) for part in parts_of(records)]

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Apply the thresholds to the whole dataset and write every shard's selection.

        Raises:
            InputError: if nothing is left.
        """
        clip_scores, verdicts = self._decided(records)
        kept = clip_scores[verdicts.codes == KEPT]
        if not len(kept):
            raise InputError(self._nothing_left(clip_scores, verdicts.codes))
        keys = KeeperKeys(records, verdicts.keepers, self._keys)
        with ThreadPoolExecutor(_IO_THREADS) as pool:
            select = partial(self._select, verdicts, keys, output)
            selected = list(pool.map(select, records, parts_of(records)))
        metrics = {
            "clip_score_mean": float(clip_scores.mean(dtype=np.float64)),
            "clip_score_mean_kept": float(kept.mean(dtype=np.float64)),
            "clip_score_min_kept": float(kept.min()),
            **{f"clip_score_p{q:02d}": float(np.percentile(clip_scores, q)) for q in _QUANTILES},
        }
        return Result(records=selected, metrics=metrics)

    def finish_bytes(self, records: Sequence[ShardRecord]) -> int:
        """See ``Stage.finish_bytes``; measured by ``tests/benchmarks/bench_decisions.py``."""
        per_sample = _FINISH_BYTES + 8 * len(self.config.concepts)
        return per_sample * sum(record.num_in for record in records)

    # ---- scores -----------------------------------------------------------------------------------------------------

    def _origin(self, shard: Shard, keys: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
        """Look up the list and row of embedded samples in the filter's selection."""
        known = table_from_bytes(shard.inputs["selection"].read(self.root), ["key", "list", "row"])
        places = pc.index_in(keys, value_set=known["key"].combine_chunks())
        if places.null_count:
            raise IntegrityError(
                f"{self.uri(shard.inputs['embeddings'])}: {places.null_count} of its samples are unknown to the "
                "filter's selection; run embed again with --force"
            )
        return {name: known[name].take(places) for name in ("list", "row")}

    def _scorers(self, shard: Shard, dim: int) -> dict[str, Head | ZeroShot]:
        """Load heads and prompts on the first shard; later shards of the same find them loaded."""
        weights = shard.inputs.get("weights")
        identity = (weights and weights.sha256, shard.params.get("heads"), dim)
        if self._loaded is None or self._loaded[0] != identity:
            scorers: dict[str, Head | ZeroShot] = {}
            scorers |= load_heads(self.config.concepts, shard.params.get("heads", {}), dim)
            if weights is not None:
                scorers |= load_zero_shot(self.config.concepts, self.root, weights)
            self._loaded = (identity, scorers)
        return self._loaded[1]

    # ---- the decision -----------------------------------------------------------------------------------------------

    def _decided(
        self, records: Sequence[ShardRecord], among: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Scores, Verdicts]:
        """Return CLIP scores of all samples in the order of the records, and the verdicts on them."""
        if not any(record.num_in for record in records):
            raise InputError("curate: no embedded sample came in; see what `unclip status` says of embed and filter")
        scores, order = self._all_scores(records)
        clip_scores = scores["clip_score"]
        left_out = np.zeros(0, np.int64)
        if among is not None:
            ranked = np.arange(len(clip_scores)) if order is None else order
            order, left_out = ranked[among[ranked]], ranked[~among[ranked]]
        if order is not None:
            scores = {name: values[order] for name, values in scores.items()}
        verdicts = decide(scores, self.config, partial(self._duplicates, records, order))
        codes = np.concatenate([verdicts.codes, np.full(len(left_out), LEFT_OUT, np.int16)])
        keepers = np.concatenate([verdicts.keepers, np.full(len(left_out), NONE, np.int64)])
        whole = None if order is None else np.concatenate([order, left_out])
        return clip_scores, Verdicts(*in_given_order(whole, codes, keepers))

    def _all_scores(self, records: Sequence[ShardRecord]) -> tuple[dict[str, Scores], Rows | None]:
        """Return the scores of all samples in the order of the records, and the samples by rank if that is another."""
        names = ("clip_score", *(f"concept_{name}" for name in sorted(self.config.concepts)))
        parts, ranks = parts_of(records), Ranks(records)
        scores = {name: np.zeros(parts[-1].stop, np.float32) for name in names}

        def read(shard: int) -> None:
            own = self._scores(records[shard], ("list", "row", *names))
            ranks.note(shard, own)
            for name in names:
                scores[name][parts[shard]] = own[name]

        with ThreadPoolExecutor(_IO_THREADS) as pool:
            list(pool.map(read, range(len(records))))
        return scores, ranks.order()

    def _scores(self, record: ShardRecord, columns: Sequence[str] | None = None) -> pa.Table:
        table = table_from_bytes(record.files["scores"].read(self.root), columns)
        if table.num_rows != record.num_in:
            raise IntegrityError(
                f"{self.uri(record.files['scores'])}: {table.num_rows} scores where the record says {record.num_in}; "
                "run curate again with --force"
            )
        return table

    def _keys(self, record: ShardRecord) -> pa.ChunkedArray:
        return self._scores(record, ("key",))["key"]

    def _duplicates(self, records: Sequence[ShardRecord], order: Rows | None, ranks: Rows) -> Rows:
        """Find the semantic duplicates among some samples.

        Args:
            records: of all samples.
            order: positions, in the order of the records, of those decided about, by rank; None: all, as they come.
            ranks: the samples to search, ascending.

        Returns:
            For each of ``ranks`` the position in ``ranks`` of its keeper, or ``NONE``.
        """
        assert self.config.semantic_duplicate_cosine is not None
        if not len(ranks):
            return np.zeros(0, np.int64)
        num_samples = sum(record.num_in for record in records)
        place = np.full(num_samples, NONE, np.int64)  # of every sample, its row among those searched
        place[ranks if order is None else order[ranks]] = np.arange(len(ranks))
        with tempfile.TemporaryFile(prefix="unclip-") as file:
            embeddings: Embeddings | None = None
            for record, part in zip(records, parts_of(records), strict=True):
                wanted = place[part] != NONE
                if wanted.any():
                    own = table_from_bytes(record.inputs["embeddings"].read(self.root), ["image_embedding"])
                    values = embeddings_of(own, "image_embedding").astype(np.float16)
                    if embeddings is None:
                        embeddings = np.memmap(file, np.float16, "w+", shape=(len(ranks), values.shape[1]))
                    embeddings[place[part][wanted]] = values[wanted]
            assert embeddings is not None
            return semantic_duplicates(embeddings, min_cosine=self.config.semantic_duplicate_cosine)

    def _select(
        self, verdicts: Verdicts, keys: KeeperKeys, output: str, record: ShardRecord, part: slice
    ) -> ShardRecord:
        """Publish one shard's selection and return its final record."""
        own, codes = self._scores(record), verdicts.codes[part]
        columns = {name: own[name] for name in own.column_names if name != "key"}
        columns["list"] = own["list"].cast(pa.large_string())
        columns["duplicate_of"] = keys.of(verdicts.keepers[part])
        columns["rule_version"] = pa.array(np.full(len(codes), RULE_VERSION, np.int32))
        selection = selection_table(own["key"].to_pylist(), self._reasons(codes), columns)
        file = self.publish(storage.join(output, f"{record.shard_id}.selection.parquet"), table_to_bytes(selection))
        counts = self._counts(codes)
        return replace(
            record,
            files={**record.files, "selection": file},
            num_kept=int((codes == KEPT).sum()),
            dropped=dict(sorted(counts.items())),
        )

    def _reasons(self, codes: Codes) -> list[str | None]:
        names = [*self.config.reasons, "left_out", None]  # LEFT_OUT and KEPT are the last
        return [names[code] for code in codes.tolist()]

    def _counts(self, codes: Codes) -> dict[str, int]:
        counts = {reason: int((codes == code).sum()) for code, reason in enumerate(self.config.reasons)}
        return {reason: count for reason, count in counts.items() if count}

    def _nothing_left(self, scores: Scores, codes: Codes) -> str:
        counts = self._counts(codes)
        if counts.keys() == {"clip_score_min"}:
            return (
                f"curate: nothing is left: {len(scores)} samples came in and curate.clip_score_min: "
                f"{self.config.clip_score_min} dropped all of them (their CLIP scores lie between {scores.min():.4f} "
                f"and {scores.max():.4f}, half of them above {np.median(scores):.4f}); lower it, or use "
                "curate.keep_fraction"
            )
        listed = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        return f"curate: nothing is left: {len(scores)} samples came in and all were dropped ({listed}); loosen these"


def decide(scores: Mapping[str, Scores], config: CurateConfig, duplicates: Callable[[Rows], Rows]) -> Verdicts:
    """Decide over all samples of a dataset.

    A sample is dropped for the first rule that applies, in the order of ``config.reasons``. Of the n samples that pass
    all others, ``keep_fraction`` keeps the ``ceil(keep_fraction * n)`` best; of equal CLIP scores the earlier.

    Args:
        scores: ``clip_score`` and ``concept_<name>`` of all samples in rank order, each float32 ``(n,)``.
        config: the thresholds.
        duplicates: finds semantic duplicates among rows (ascending): of each, the position of its keeper, or ``NONE``.
    """
    clip_scores = scores["clip_score"]
    codes, keepers = np.full(len(clip_scores), KEPT, np.int16), np.full(len(clip_scores), NONE, np.int64)
    code_of = {reason: code for code, reason in enumerate(config.reasons)}
    if config.clip_score_min is not None:
        codes[clip_scores < config.clip_score_min] = code_of["clip_score_min"]
    for name, concept in sorted(config.concepts.items()):
        too_much = scores[f"concept_{name}"] > np.float32(concept.max)
        codes[(codes == KEPT) & too_much] = code_of[f"concept_{name}"]
    if config.semantic_duplicate_cosine is not None:
        open_ = np.flatnonzero(codes == KEPT)
        found = duplicates(open_)
        codes[open_[found != NONE]] = code_of["semantic_duplicate"]
        keepers[open_[found != NONE]] = open_[found[found != NONE]]
    remaining = np.flatnonzero(codes == KEPT)
    # 0.1 * 30 is a little more than 3 in binary; that must not keep a fourth sample.
    num_kept = math.ceil(config.keep_fraction * len(remaining) - 1e-9)
    best_first = remaining[np.argsort(-clip_scores[remaining], kind="stable")]
    codes[best_first[num_kept:]] = code_of["keep_fraction"]
    return Verdicts(codes, keepers)
