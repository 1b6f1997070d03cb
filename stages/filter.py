"""Filter: which downloaded samples stay, and why the others go. Images are not rewritten.

``process`` only measures (perceptual hash and tones of every image, language of every caption); ``finish`` decides,
from the measurements and the download's table, by the rules of the config (``stages/filter_rules.py``). So other
thresholds need no image to be read again.

The decision depends on the samples and their rank alone: the order of their lists, then the row. How rows are cut into
shards, and the order in which the shards of a list come, change nothing. Of equal or nearly equal images the earliest
stays; what comes later never removes it, so appended lists leave old selections as they are. The one exception is
meant: an image that turns up under ever more URLs becomes a placeholder, and then all its samples go.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages import storage
from stages.base import Resources, Result, Shard, Stage
from stages.blocklists import HeldOut, UrlBlocklist, held_out_identity, read_image_blocklist
from stages.caption_language import known_languages, languages_of
from stages.errors import ConfigError, InputError, ShardError, StageError
from stages.filter_rules import KEPT, REASONS, RULE_VERSION, Codes, FilterConfig, Lists, judge
from stages.filter_set_rules import Facts, Verdicts, decide
from stages.image_hash import NUM_TONES, measure_image
from stages.keeper_keys import KeeperKeys
from stages.keepers import Rows
from stages.manifest import Manifest, ShardRecord, digest_of
from stages.ranks import Ranks, in_given_order, parts_of
from stages.samples import read_tar, selection_table, table_from_bytes, table_to_bytes

_IO_THREADS = 16
_FINISH_BYTES = 150  # per sample
_REPEATS_BYTES = 32  # more, where captions may repeat so often: they are known, and files till the end
_ORIGIN = {
    "key": pa.large_string(),
    "list": pa.large_string(),
    "row": pa.int64(),
    "status": pa.large_string(),
}
_FACTS = _ORIGIN | {
    "url": pa.large_string(),
    "caption": pa.large_string(),
    "sha256": pa.large_string(),
    "original_width": pa.int64(),
    "original_height": pa.int64(),
}
_MEASUREMENTS = {
    "key": pa.large_string(),
    "perceptual_hash": pa.uint64(),
    "tones": pa.binary(NUM_TONES),
    "language": pa.large_string(),
    "language_probability": pa.float32(),
}
_SHOWN = {name: kind for name, kind in _MEASUREMENTS.items() if name != "tones"}


class Filter(Stage[FilterConfig]):
    """Selects samples by rules; see the module's docstring."""

    name: ClassVar[str] = "filter"
    counts: ClassVar[str | None] = "download"
    version: ClassVar[int] = RULE_VERSION

    @property
    def upstream(self) -> tuple[str, ...]:
        """It reads the images and tables of ``download``."""
        return ("download",)

    @property
    def resources(self) -> Resources:
        """One core."""
        return Resources(num_cpus=1.0)

    def external(self) -> Any:
        """Identify the blocklists and the held-out images by content.

        Raises:
            InputError: if one is missing or holds what it should not.
        """
        found: dict[str, str] = {}
        if self.config.image_blocklist is not None:
            found["image_blocklist"] = digest_of(sorted(read_image_blocklist(self.config.image_blocklist)))
        if self.config.url_blocklist is not None:
            found["url_blocklist"] = UrlBlocklist.read(self.config.url_blocklist).identity
        if self.config.held_out_images is not None:
            found["held_out_images"] = held_out_identity(self.config.held_out_images)
        return found or None

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Make one shard of every download shard.

        Raises:
            InputError: if nothing was downloaded.
            ConfigError: if a language is asked for that cannot be told from others.
        """
        self._check_languages()
        records = inputs["download"].records
        if not any(record.num_kept for record in records):
            raise InputError("filter: the download holds no images; look at its dropped rows with unclip status")
        return [
            self.shard(index, inputs={role: record.files[role] for role in ("images", "table")})
            for index, record in enumerate(records)
        ]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Measure every image and caption of one shard; nothing is dropped yet.

        Raises:
            ShardError: if an image does not decode.
        """
        started_at = time.monotonic()
        keys: list[str] = []
        captions: list[str] = []
        measured: list[tuple[int, bytes]] = []
        for sample in read_tar(shard.inputs["images"].read(self.root)):
            try:
                measured.append(measure_image(sample.image))
            except (OSError, ValueError) as error:
                raise ShardError(
                    f"{shard.inputs['images'].path}: image of '{sample.key}' is damaged: {error}"
                ) from error
            keys.append(sample.key)
            captions.append(sample.caption)
        languages = languages_of(captions)
        columns = {
            "key": keys,
            "perceptual_hash": [hash_ for hash_, _ in measured],
            "tones": [tones for _, tones in measured],
            "language": [language for language, _ in languages],
            "language_probability": [probability for _, probability in languages],
        }
        scores = pa.table({name: pa.array(values, _MEASUREMENTS[name]) for name, values in columns.items()})
        files = {"scores": ("scores.parquet", table_to_bytes(scores))}
        return self.commit(shard, output, files, started_at=started_at, num_in=len(keys), num_kept=len(keys))

    def decide(self, records: Sequence[ShardRecord]) -> list[list[str | None]]:
        """Say why each sample of each shard is dropped, None where it is kept; writes nothing.

        Args:
            records: of the shards that ``process`` measured.

        Returns:
            The reasons of every shard, in the order of ``records`` and of the samples in them.
        """
        verdicts = self._decided(records)
        return [_reasons(verdicts.codes[part]) for part in parts_of(records)]

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Decide on every sample of the data set and publish one selection per shard.

        Raises:
            StageError: if no sample is kept.
        """
        verdicts = self._decided(records)
        keys = KeeperKeys(records, verdicts.keepers, self._keys)
        with ThreadPoolExecutor(_IO_THREADS) as pool:
            write = partial(self._select, verdicts, keys, output)
            final = list(pool.map(write, records, parts_of(records)))
        if not any(record.num_kept for record in final):
            totals = sum((Counter(record.dropped) for record in final), Counter[str]())
            listed = ", ".join(f"{reason}: {count}" for reason, count in totals.most_common())
            raise StageError(f"filter: none of {totals.total()} samples is kept ({listed}); loosen these rules")
        return Result(records=final)

    def finish_bytes(self, records: Sequence[ShardRecord]) -> int:
        """See ``Stage.finish_bytes``; measured by ``tests/benchmarks/bench_decisions.py``."""
        repeats = 0 if self.config.max_caption_repeats is None else _REPEATS_BYTES
        return (_FINISH_BYTES + repeats) * sum(record.num_in for record in records)

    def _check_languages(self) -> None:
        if not self.config.caption_languages:
            return
        known = known_languages()
        unknown = next((code for code in self.config.caption_languages if code not in known), None)
        if unknown is not None:
            raise ConfigError(
                f"filter.caption_languages: '{unknown}' cannot be told from other languages; choose from "
                f"{', '.join(sorted(known))}"
            )

    def _lists(self) -> Lists:
        config = self.config
        lists = Lists()
        if config.image_blocklist is not None:
            lists = replace(lists, blocked_images=read_image_blocklist(config.image_blocklist))
        if config.url_blocklist is not None:
            lists = replace(lists, blocked_urls=UrlBlocklist.read(config.url_blocklist))
        if config.held_out_images is not None:
            lists = replace(lists, held_out=HeldOut.read(config.held_out_images))
        return lists

    def _decided(self, records: Sequence[ShardRecord]) -> Verdicts:
        """Return the verdicts on all samples in the order of the records."""
        lists = self._lists()
        facts, order = self._facts(records, lists)
        verdicts = decide(facts, self.config, lists.held_out)
        return Verdicts(*in_given_order(order, verdicts.codes, verdicts.keepers))

    def _facts(self, records: Sequence[ShardRecord], lists: Lists) -> tuple[Facts, Rows | None]:
        """Return what is known of all samples, by rank, and their positions if that is not the order of the records."""
        parts = parts_of(records)
        facts, ranks = Facts(parts[-1].stop, self.config), Ranks(records)

        def read(shard: int) -> None:
            samples = self._samples(records[shard], _MEASUREMENTS, _FACTS)
            facts.note(parts[shard], samples, judge(samples, self.config, lists))
            ranks.note(shard, samples)

        with ThreadPoolExecutor(_IO_THREADS) as pool:
            list(pool.map(read, range(len(records))))
        order = ranks.order()
        if order is not None:
            facts.sort(order)
        return facts, order

    def _keys(self, record: ShardRecord) -> pa.ChunkedArray:
        return table_from_bytes(record.files["scores"].read(self.root), ["key"])["key"]

    def _samples(
        self, record: ShardRecord, measurements: Mapping[str, pa.DataType], facts: Mapping[str, pa.DataType]
    ) -> pa.Table:
        """Join the measurements of a shard to its table, of both the columns that are wanted.

        Raises:
            ShardError: if the two do not name the same samples.
        """
        measured = _read(record.files["scores"].read(self.root), measurements)
        table = _read(record.inputs["table"].read(self.root), facts)
        samples = table.filter(pc.equal(table["status"], "success")).drop_columns(["status"])
        if len(measured) != record.num_in or not samples["key"].equals(measured["key"]):
            raise ShardError(
                f"{record.inputs['images'].path}: the tar and the table beside it name different samples; "
                "run again with --force download"
            )
        for name in measured.column_names[1:]:
            samples = samples.append_column(name, measured[name])
        return samples

    def _select(
        self, verdicts: Verdicts, keys: KeeperKeys, output: str, record: ShardRecord, part: slice
    ) -> ShardRecord:
        """Publish one shard's selection and return its final record."""
        # Read again: the texts of a large data set do not fit beside what the decision needs.
        own, codes = self._samples(record, _SHOWN, _ORIGIN), verdicts.codes[part]
        scores = {name: own[name] for name in ("list", "row", *_SHOWN) if name != "key"}
        scores["duplicate_of"] = keys.of(verdicts.keepers[part])
        scores["rule_version"] = pa.array(np.full(len(codes), RULE_VERSION, np.int32))
        selection = selection_table(own["key"].to_pylist(), _reasons(codes), scores)
        file = self.publish(storage.join(output, f"{record.shard_id}.selection.parquet"), table_to_bytes(selection))
        counts = {reason: int((codes == code).sum()) for code, reason in enumerate(REASONS)}
        return replace(
            record,
            files={**record.files, "selection": file},
            num_kept=int((codes == KEPT).sum()),
            dropped=dict(sorted((reason, count) for reason, count in counts.items() if count)),
        )


def _reasons(codes: Codes) -> list[str | None]:
    names = [*REASONS, None]  # KEPT is the last
    return [names[code] for code in codes.tolist()]


def _read(data: bytes, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Read columns, and give them their types."""
    return table_from_bytes(data, list(types)).select(list(types)).cast(pa.schema(list(types.items())))
