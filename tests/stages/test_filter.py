"""The filter: every rule by its reason, duplicates across shards with a fixed keeper, counters that balance."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.errors import InputError, ShardError, StageError
from stages.executor import ClusterConfig, LocalExecutor
from stages.filter import REASONS, Filter, FilterConfig, NearDuplicates, measure_image
from stages.manifest import File, Manifest, ShardRecord
from stages.runner import run_stage
from stages.samples import Sample, kept_keys, table_from_bytes, table_to_bytes, write_tar
from stages.shapes import ShapesConfig, image_bytes, picture_of, render

OFF = {"placeholder_min_urls": None, "near_duplicate_bits": None, "drop_duplicates": False}
Row = dict[str, Any]


def photo(seed: int, side: int = 48) -> npt.NDArray[np.uint8]:
    """A smooth random image; different seeds look different."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def encoded(image: npt.NDArray[np.uint8], image_format: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, image_format, **options)
    return sink.getvalue()


def row(seed: int = 0, **changes: Any) -> Row:
    image = changes.pop("image", None) or encoded(photo(seed))
    base = {"url": f"http://a/{seed}", "caption": "a photo", "image": image, "width": 48, "height": 48}
    return base | changes


class Store:
    """A store with a download stage of hand-made shards."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def publish(self, data: bytes) -> File:
        sha256 = hashlib.sha256(data).hexdigest()
        (Path(self.root) / sha256).write_bytes(data)
        return File(sha256, sha256, len(data))

    def download(self, shards: Sequence[Sequence[Row]]) -> Manifest:
        records = []
        for index, rows in enumerate(shards):
            keys = [f"{index:04d}{position:06d}" for position in range(len(rows))]
            table = pa.table(
                {
                    "key": keys,
                    "url": [r["url"] for r in rows],
                    "caption": pa.array([r["caption"] for r in rows], pa.string()),
                    "status": [r.get("status", "success") for r in rows],
                    "sha256": [hashlib.sha256(r["image"]).hexdigest() for r in rows],
                    "original_width": pa.array([r["width"] for r in rows], pa.int32()),
                    "original_height": pa.array([r["height"] for r in rows], pa.int32()),
                }
            )
            samples = [
                Sample(key=key, image=r["image"], extension="png", caption=r["caption"] or "")
                for key, r in zip(keys, rows, strict=True)
                if r.get("status", "success") == "success"
            ]
            files = {
                "images": self.publish(write_tar(samples)),
                "table": self.publish(table_to_bytes(table)),
            }
            failed = len(rows) - len(samples)
            dropped = {"http_404": failed} if failed else {}
            records.append(
                ShardRecord(shard_id=f"d{index}", files=files, num_in=len(rows), num_kept=len(samples), dropped=dropped)
            )
        return Manifest(
            root=self.root, stage="download", version=1, fingerprint="0" * 16, config={}, inputs={}, records=records
        )

    def filter(self, shards: Sequence[Sequence[Row]], **config: Any) -> Manifest:
        stage = Filter(FilterConfig(**config), root=self.root)
        inputs = {"download": self.download(shards)}
        fingerprint = stage.fingerprint({"download": inputs["download"].digest})
        return run_stage(stage, fingerprint, inputs, LocalExecutor(), ClusterConfig(executor="local", max_attempts=1))

    def reasons(self, manifest: Manifest) -> list[list[str | None]]:
        tables = [table_from_bytes(r.files["selection"].read(self.root)) for r in manifest.records]
        return [table["reason"].to_pylist() for table in tables]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize(
    ("bad", "config", "reason"),
    [
        (row(1, width=15, height=100), {"min_side_px": 16}, "too_small"),
        (row(1, width=100, height=301), {"max_aspect": 3.0}, "aspect"),
        (row(1, caption=None), {}, "no_caption"),
        (row(1, caption="  "), {}, "no_caption"),
        (row(1, caption=" ab "), {"min_caption_length": 3}, "caption_too_short"),
        (row(1, caption="abcdefghij"), {"max_caption_length": 9}, "caption_too_long"),
        (row(1, caption="Buy NOW at shop.example"), {"caption_blocklist": ("^x$", r"\bbuy now\b")}, "caption_blocked"),
    ],
)
def test_each_rule_has_its_reason(store: Store, bad: Row, config: dict[str, Any], reason: str) -> None:
    manifest = store.filter([[row(0), bad]], **{**OFF, **config})
    assert reason in REASONS
    assert store.reasons(manifest) == [[None, reason]]
    (record,) = manifest.records
    assert (record.num_in, record.num_kept, record.dropped) == (2, 1, {reason: 1})


def test_limits_are_inclusive_and_captions_optional(store: Store) -> None:
    rows = [row(0, width=16, height=48), row(1, caption=None), row(2, caption="abc")]
    config = {"min_side_px": 16, "max_aspect": 3.0, "require_caption": False, "min_caption_length": 3}
    assert store.reasons(store.filter([rows], **OFF, **config)) == [[None, None, None]]


def test_failed_rows_are_not_samples(store: Store) -> None:
    manifest = store.filter([[row(0), row(1, status="failed"), row(2)]], **OFF)
    assert manifest.num_in == manifest.num_kept == 2
    selection = table_from_bytes(manifest.records[0].files["selection"].read(store.root))
    assert kept_keys(selection) == ["0000000000", "0000000002"]
    assert set(manifest.records[0].inputs) == {"images", "table"}


def test_the_first_of_identical_images_stays_across_shards(store: Store) -> None:
    same = encoded(photo(7))
    shards = [[row(0), row(1, image=same)], [row(2, image=same), row(3)], [row(4, image=same)]]
    manifest = store.filter(shards, placeholder_min_urls=None)
    assert store.reasons(manifest) == [[None, None], ["duplicate", None], ["duplicate"]]
    assert manifest.dropped == {"duplicate": 2}


def test_a_dropped_sample_keeps_no_other_out(store: Store) -> None:
    same = encoded(photo(7))
    manifest = store.filter([[row(1, image=same, caption=None), row(2, image=same)]], placeholder_min_urls=None)
    assert store.reasons(manifest) == [["no_caption", None]]


def test_near_duplicates_across_shards(store: Store) -> None:
    image = photo(7)
    copies = [
        encoded(image, "JPEG", quality=60),
        encoded(np.asarray(Image.fromarray(image).resize((90, 90), Image.Resampling.BICUBIC))),
        encoded(np.clip(image.astype(int) + 3, 0, 255).astype(np.uint8)),
    ]
    shards = [[row(0), row(7)], *[[row(10 + i, image=copy)] for i, copy in enumerate(copies)], [row(20)]]
    manifest = store.filter(shards)
    assert store.reasons(manifest) == [[None, None], *[["near_duplicate"]] * 3, [None]]


def test_equal_structure_in_other_colours_is_no_duplicate(store: Store) -> None:
    picture = picture_of(ShapesConfig(), 3)
    images = [
        encoded(render(picture.__class__(**(vars(picture) | {"foreground": colour, "background": "black"})), 64))
        for colour in ("red", "green", "blue", "yellow")
    ]
    manifest = store.filter([[row(i, image=image) for i, image in enumerate(images)]])
    assert store.reasons(manifest) == [[None] * 4]


def test_an_image_under_many_urls_is_a_placeholder(store: Store) -> None:
    grey = encoded(np.full((48, 48, 3), 128, np.uint8))
    shards = [[row(0), row(1, image=grey)], [row(2, image=grey), row(3, image=grey)]]
    assert store.reasons(store.filter(shards, placeholder_min_urls=3)) == [[None, "placeholder"], ["placeholder"] * 2]
    assert store.reasons(store.filter(shards, placeholder_min_urls=4)) == [[None, None], ["duplicate"] * 2]
    one_url = [[row(1, image=grey), row(1, image=grey), row(1, image=grey)]]
    assert store.reasons(store.filter(one_url, placeholder_min_urls=2)) == [[None, "duplicate", "duplicate"]]


def test_blocked_images(store: Store, tmp_path: Path) -> None:
    blocked = encoded(photo(1))
    path = tmp_path / "blocked.txt"
    path.write_text(hashlib.sha256(blocked).hexdigest().upper() + "\n")
    config = {**OFF, "image_blocklist": str(path)}
    assert store.reasons(store.filter([[row(0), row(1, image=blocked)]], **config)) == [[None, "image_blocked"]]
    before = Filter(FilterConfig(image_blocklist=str(path)), root="r").external()
    path.write_text("")
    assert Filter(FilterConfig(image_blocklist=str(path)), root="r").external() != before
    path.write_text("not a hash")
    with pytest.raises(InputError, match="'not' is not a sha256"):
        Filter(FilterConfig(image_blocklist=str(path)), root="r").external()
    with pytest.raises(InputError, match=r"filter\.image_blocklist"):
        Filter(FilterConfig(image_blocklist=str(tmp_path / "gone")), root="r").external()


def test_appended_shards_leave_old_selections_as_they_are(store: Store) -> None:
    shards = [[row(i) for i in range(5)], [row(3), row(6)]]
    old = store.filter(shards)
    new = store.filter([*shards, [row(0), row(6), row(9)]])
    for before, after in zip(old.records, new.records[:2], strict=True):
        assert before.identity == after.identity
    assert store.reasons(new)[2] == ["duplicate", "duplicate", None]


def test_thresholds_need_no_image_again(store: Store) -> None:
    shards = [[row(0), row(1, caption="xx")]]
    loose, strict = Filter(FilterConfig(), root="r"), Filter(FilterConfig(min_caption_length=5), root="r")
    inputs = {"download": store.download(shards)}
    assert [s.id for s in loose.plan(inputs)] == [s.id for s in strict.plan(inputs)]
    assert loose.fingerprint({"download": "x"}) != strict.fingerprint({"download": "x"})


def test_nothing_kept_and_nothing_downloaded_are_errors(store: Store) -> None:
    with pytest.raises(StageError, match=r"none of 2 samples is kept \(no_caption: 1, too_small: 1\)"):
        store.filter([[row(0, caption=None), row(1, width=3)]])
    with pytest.raises(InputError, match="holds no images"):
        store.filter([[row(0, status="failed")]])


def test_damage_is_not_skipped(store: Store) -> None:
    manifest = store.download([[row(0, image=b"no image")]])
    stage = Filter(FilterConfig(), root=store.root)
    with pytest.raises(ShardError, match="image of '0000000000' is damaged"):
        stage.process(stage.plan({"download": manifest})[0], f"{store.root}/filter/shards")
    manifest = store.download([[row(0), row(1)]])
    other = store.download([[row(0), row(1), row(2)]]).records[0].files["table"]
    (shard,) = stage.plan({"download": manifest})
    record = stage.process(shard, f"{store.root}/filter/shards")
    mixed = dataclasses.replace(record, inputs={**record.inputs, "table": other})
    with pytest.raises(ShardError, match="different samples"):
        stage.finish([mixed], f"{store.root}/filter/x", {})


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 255), min_size=2, max_size=40), st.integers(0, 6))
def test_near_duplicates_equal_the_comparison_with_everything(values: list[int], max_bits: int) -> None:
    # Few different bytes repeated eight times: many hashes within a few bits of each other.
    hashes = [np.uint64(int.from_bytes(bytes([value] * 7 + [value // 2]), "big")) for value in values]
    tones = [np.full(48, 10 * (value % 3), np.uint8) for value in values]
    search, kept = NearDuplicates(max_bits, 5), []
    for hash_, tone in zip(hashes, tones, strict=True):
        near = any(
            int(other ^ hash_).bit_count() <= max_bits and abs(int(tone[0]) - int(other_tone[0])) <= 5
            for other, other_tone in kept
        )
        assert search.add(hash_, tone) is not near
        if not near:
            kept.append((hash_, tone))


def test_near_duplicates_grow() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 3000, dtype=np.uint64)
    search, tones = NearDuplicates(4, 12), np.zeros(48, np.uint8)
    assert all(search.add(hash_, tones) for hash_ in hashes)
    assert not any(search.add(hash_ ^ np.uint64(0b1011), tones) for hash_ in hashes)


def test_shapes_are_not_near_duplicates_of_each_other() -> None:
    config = ShapesConfig(
        missing_fraction=0, broken_fraction=0, tiny_fraction=0, placeholder_fraction=0, duplicate_fraction=0
    )
    search = NearDuplicates(FilterConfig().near_duplicate_bits or 0, FilterConfig().near_duplicate_levels)
    num_kept = 0
    for index in range(500):
        hash_, tones = measure_image(image_bytes(config, index) or b"")
        num_kept += search.add(np.uint64(hash_), np.frombuffer(tones, np.uint8))
    assert num_kept >= 497


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_blocklist": ("(",)}, "caption_blocklist: '\\('"),
        ({"max_aspect": 0.5}, "max_aspect"),
        ({"min_caption_length": 5, "max_caption_length": 4}, "min_caption_length"),
        ({"placeholder_min_urls": 1}, "placeholder_min_urls"),
        ({"near_duplicate_bits": 64}, "near_duplicate_bits"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilterConfig(**wrong)
