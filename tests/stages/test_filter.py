"""The filter: every rule by its reason, duplicates across shards with a fixed keeper, counters that balance."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages import filter_set_rules
from stages.errors import ConfigError, InputError, ShardError, StageError
from stages.executor import ClusterConfig, LocalExecutor
from stages.filter import Filter
from stages.filter_rules import REASONS, RULE_VERSION, FilterConfig
from stages.manifest import File, Manifest, ShardRecord
from stages.runner import run_stage
from stages.samples import Sample, kept_keys, table_from_bytes, table_to_bytes, write_tar
from stages.shapes import ShapesConfig, picture_of, render

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
            start = sum(map(len, shards[:index]))
            table = pa.table(
                {
                    "key": keys,
                    "list": [r.get("list", "a.parquet") for r in rows],
                    "row": [r.get("row", start + position) for position, r in enumerate(rows)],
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
        (row(1, width=10, height=49), {"max_side_px": 48, "min_side_px": 1, "max_aspect": 9.0}, "too_large"),
        (row(1, width=47, height=48), {"min_pixels": 48 * 48}, "too_few_pixels"),
        (row(1, caption=None), {}, "no_caption"),
        (row(1, caption="  "), {}, "no_caption"),
        (row(1, caption=" ab "), {"min_caption_length": 3}, "caption_too_short"),
        (row(1, caption="abcdefghij"), {"max_caption_length": 9}, "caption_too_long"),
        (row(1, caption="Buy NOW at shop.example"), {"caption_blocklist": ("^x$", r"\bbuy now\b")}, "caption_blocked"),
        (row(1, caption="DSC_2019 0001"), {"min_letter_fraction": 0.5}, "caption_not_text"),
        (row(1), {"max_caption_repeats": 1}, "caption_repeated"),
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


def test_blocked_urls(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("\ufeffhttps://b.org/ads/\n# unwanted\nExample.com\nmünchen.de.\n\n")  # as Windows writes it
    cases = {
        "https://example.com/1.jpg": True,
        "https://IMG.example.com:8080/1.jpg": True,
        "https://user:word@example.com/1.jpg": True,
        "https://a@b@cdn.example.com?x": True,
        "https://example.com./1.jpg": True,
        "https://xn--mnchen-3ya.de/1.jpg": True,
        "https://www.MÜNCHEN.de/1.jpg": True,
        "https://b.org/ads/1.jpg": True,
        "https://notexample.com/1.jpg": False,
        "https://example.com.org/1.jpg": False,
        "https://c.org/example.com/1.jpg": False,
        "https://c.org?u=https://example.com/": False,
        "https://c.org\\@example.com/": False,
        "https://b.org/1.jpg": False,
        "http://b.org/ads/1.jpg": False,
        "no url": False,
        " \u3000https://example.com/1.jpg": True,
        "\x01https://example.com/1.jpg": True,
        "ht\ntps://exam\tple.com/1.jpg": True,
        "\thttps://b.org/ads/1.jpg": True,
    }
    rows = [row(i, url=url) for i, url in enumerate(cases)] + [row(99, url=None)]
    manifest = store.filter([rows], url_blocklist=str(path), **OFF)
    assert store.reasons(manifest) == [["url_blocked" if blocked else None for blocked in cases.values()] + [None]]


def test_lists_are_known_by_content(tmp_path: Path) -> None:
    path, moved = tmp_path / "urls.txt", tmp_path / "moved.txt"
    path.write_text("a.com\nb.com\n")
    moved.write_text("# the same\nB.com\na.com\n")
    same = [Filter(FilterConfig(url_blocklist=str(p)), root="r").external() for p in (path, moved)]
    assert same[0] == same[1]
    moved.write_text("a.com")
    assert Filter(FilterConfig(url_blocklist=str(moved)), root="r").external() != same[0]
    path.write_text("a b c")
    with pytest.raises(InputError, match=r"filter\.url_blocklist: .*'a b c' is neither a host"):
        Filter(FilterConfig(url_blocklist=str(path)), root="r").external()


def test_nothing_like_a_held_out_image_is_kept(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "held out"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(photo(1)).resize((120, 120), Image.Resampling.BICUBIC).save(folder / "a.JPG", "JPEG", quality=80)
    Image.fromarray(photo(2)).save(folder / "deep" / "b.png")
    (folder / "readme.txt").write_text("no image")
    config = {**OFF, "held_out_images": str(folder)}
    shards = [[row(0), row(1)], [row(2), row(1, caption=None)]]
    manifest = store.filter(shards, **config)
    assert store.reasons(manifest) == [[None, "held_out"], ["held_out", "no_caption"]]
    stage = Filter(FilterConfig(held_out_images=str(folder)), root="r")
    before = stage.external()
    (folder / "a.JPG").rename(folder / "deep" / "c.jpg")
    assert stage.external() == before
    (folder / "deep" / "c.jpg").unlink()
    assert stage.external() != before
    (folder / "deep" / "b.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"b\.png does not decode"):
        store.filter(shards, **config)
    (folder / "deep" / "b.png").unlink()
    with pytest.raises(InputError, match=r"filter\.held_out_images: .* holds no \.jpg"):
        stage.external()


def test_letters_are_those_of_every_script(store: Store) -> None:
    captions = ["a house", "一座房子", "एक घर की फोटो", "un été à Paris", "12 34 567", "*** !!!", "img 00012"]
    rows = [row(i, caption=caption) for i, caption in enumerate(captions)]
    (reasons,) = store.reasons(store.filter([rows], min_letter_fraction=1.0, **OFF))
    assert reasons == [None] * 4 + ["caption_not_text"] * 3
    (reasons,) = store.reasons(store.filter([rows], min_letter_fraction=0.375, **OFF))
    assert reasons == [None] * 4 + ["caption_not_text"] * 2 + [None]  # 3 of 8


def test_languages_are_measured_and_kept_beside_the_decision(store: Store) -> None:
    captions = [
        "a small house beside a quiet lake",
        "ein altes Haus an einem stillen See",
        "une maison près du lac",
        "",
    ]
    rows = [row(i, caption=caption) for i, caption in enumerate(captions)]
    config = {**OFF, "caption_languages": ("en", "fr"), "require_caption": False}
    manifest = store.filter([rows], **config)
    assert store.reasons(manifest) == [[None, "caption_language", None, None]]
    table = table_from_bytes(manifest.records[0].files["selection"].read(store.root))
    assert table["language"].to_pylist() == ["en", "de", "fr", "und"]
    probabilities = table["language_probability"].to_pylist()
    assert all(0.5 < p <= 1 for p in probabilities[:3]) and probabilities[3] == 0
    least = min(probabilities[0], probabilities[2])
    strict = store.filter([rows], **config, language_min_probability=float(np.nextafter(np.float32(least), 1)))
    assert store.reasons(strict)[0].count("caption_language") == 2
    with pytest.raises(ConfigError, match=r"filter\.caption_languages: 'xx' cannot be told.* en, "):
        store.filter([rows], caption_languages=("en", "xx"))


def test_only_so_many_samples_of_a_caption(store: Store) -> None:
    same = encoded(photo(7))
    shards = [
        [row(0, image=same, caption="x"), row(1, image=same, caption="x"), row(2, caption=" x ")],
        [row(3, caption="x"), row(4, caption="X"), row(5, caption=""), row(6, caption="")],
    ]
    manifest = store.filter(shards, max_caption_repeats=2, require_caption=False, placeholder_min_urls=None)
    # A sample that another rule drops does not count.
    assert store.reasons(manifest) == [[None, "duplicate", None], ["caption_repeated", None, None, None]]


def test_a_copy_stays_if_the_first_one_went_for_its_caption(store: Store) -> None:
    same, other = encoded(photo(7)), encoded(photo(7), "JPEG", quality=60)
    shards = [[row(0, caption="photo"), row(1, image=same, caption="photo"), row(2, image=same, caption="a red dog")]]
    shards += [[row(3, image=other, caption="a cat"), row(4, image=same, caption="photo")]]
    manifest = store.filter(shards, max_caption_repeats=1, placeholder_min_urls=None)
    assert store.reasons(manifest) == [[None, "caption_repeated", None], ["near_duplicate", "caption_repeated"]]
    tables = [table_from_bytes(r.files["selection"].read(store.root)) for r in manifest.records]
    assert tables[1]["duplicate_of"].to_pylist() == ["0000000002", None]


def test_many_copies_with_one_caption_are_decided_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    whole = filter_set_rules._drop_repeats
    monkeypatch.setattr(filter_set_rules, "_drop_repeats", lambda *given: (turns.append(1), whole(*given))[1])
    same = encoded(photo(7))
    rows = [row(0, caption="logo"), *(row(i, image=same, caption="logo") for i in range(1, 30))]
    rows.append(row(30, image=same, caption="a fox"))
    manifest = store.filter([rows], max_caption_repeats=1, placeholder_min_urls=None)
    assert store.reasons(manifest) == [[None, *["caption_repeated"] * 29, None]]
    assert len(turns) == 2


def test_a_duplicate_names_what_keeps_it_out(store: Store) -> None:
    image = photo(7)
    same, near = encoded(image), encoded(image, "JPEG", quality=60)
    shards = [[row(0), row(1, image=same)], [row(2, image=near), row(3, image=same), row(4, image=near)]]
    manifest = store.filter(shards, placeholder_min_urls=None)
    assert store.reasons(manifest) == [[None, None], ["near_duplicate", "duplicate", "duplicate"]]
    tables = [table_from_bytes(r.files["selection"].read(store.root)) for r in manifest.records]
    assert [table["duplicate_of"].to_pylist() for table in tables] == [[None, None], ["0000000001"] * 3]
    assert {version for table in tables for version in table["rule_version"].to_pylist()} == {RULE_VERSION}
    assert tables[1]["row"].to_pylist() == [2, 3, 4]


CAPTIONS = ("a red house", "ein altes Haus an einem See", "x", None, "12345", "buy it now")
IMAGES = [encoded(photo(seed)) for seed in range(4)]
IMAGES += [encoded(photo(seed), "JPEG", quality=70) for seed in range(2)]
EVERYTHING: dict[str, Any] = {
    "min_letter_fraction": 0.5,
    "caption_languages": ("en",),
    "caption_blocklist": ("buy",),
    "max_caption_repeats": 3,
    "placeholder_min_urls": 4,
    "min_side_px": 40,
}
ROWS = st.lists(
    st.tuples(
        st.integers(0, len(IMAGES) - 1), st.sampled_from(CAPTIONS), st.integers(0, 5), st.sampled_from([48, 48, 48, 30])
    ),
    min_size=1,
    max_size=24,
)


def rows_of(values: Sequence[tuple[int, str | None, int, int]]) -> list[Row]:
    return [row(image=IMAGES[i], caption=text, url=f"http://a/{url}", width=width) for i, text, url, width in values]


def decided(rows: Sequence[Row], shard_size: int, order: Sequence[int] = ()) -> tuple[list[Row], list[str | None]]:
    """Decide on rows cut into shards that come in any order; return rows and reasons by rank."""
    rows = [{**r, "row": rank} for rank, r in enumerate(rows)]
    shards = [rows[start : start + shard_size] for start in range(0, len(rows), shard_size)]
    shards = [shards[i % len(shards)] for i in (order or range(len(shards)))]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        stage = Filter(FilterConfig(**EVERYTHING), root=store.root)
        records = [stage.process(s, f"{folder}/shards") for s in stage.plan({"download": store.download(shards)})]
        before = sorted(path for path in Path(folder).rglob("*"))
        reasons = stage.decide(records)
        assert sorted(path for path in Path(folder).rglob("*")) == before  # it writes nothing
        try:
            finished = stage.finish(records, f"{folder}/out", {}).records
        except StageError:
            assert all(reason is not None for shard in reasons for reason in shard)
        else:
            kept, keepers = set[str](), set[str]()
            for shard, record in zip(reasons, finished, strict=True):
                assert record.num_in == len(shard) and record.num_kept == shard.count(None)
                assert record.dropped == {r: shard.count(r) for r in REASONS if shard.count(r)}
                table = table_from_bytes(record.files["selection"].read(store.root))
                assert table["reason"].to_pylist() == shard
                kept.update(table.filter(table["kept"])["key"].to_pylist())
                keepers.update(key for key in table["duplicate_of"].to_pylist() if key is not None)
            assert keepers <= kept
    by_rank = {r["row"]: why for r, why in zip(chain(*shards), chain(*reasons), strict=True)}
    return rows, [by_rank[rank] for rank in range(len(rows))]


@settings(deadline=None, max_examples=10)
@given(ROWS, st.integers(1, 24), st.randoms(use_true_random=False))
def test_shards_and_their_order_change_nothing(values: list[Any], shard_size: int, random: Random) -> None:
    rows = rows_of(values)
    _, whole = decided(rows, len(rows))
    order = list(range(-(-len(rows) // shard_size)))
    random.shuffle(order)
    assert decided(rows, shard_size, order)[1] == whole


@settings(deadline=None, max_examples=12)
@given(ROWS)
def test_filtering_what_is_kept_drops_nothing(values: list[Any]) -> None:
    ranked, reasons = decided(rows_of(values), 7)
    kept = [r for r, reason in zip(ranked, reasons, strict=True) if reason is None]
    if kept:
        assert decided(kept, 5)[1] == [None] * len(kept)


def test_lists_rank_in_the_order_of_the_config(store: Store) -> None:
    same = encoded(photo(7))
    shards = [
        [row(1, image=same, list="z.parquet", row=5)],
        [row(2, image=same, list="a.parquet", row=0)],
        [row(3, image=same, list="z.parquet", row=2)],
    ]
    manifest = store.filter(shards, placeholder_min_urls=None)
    assert store.reasons(manifest) == [["duplicate"], ["duplicate"], [None]]


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"caption_blocklist": ("(",)}, "caption_blocklist: '\\('"),
        ({"max_aspect": 0.5}, "max_aspect"),
        ({"min_caption_length": 5, "max_caption_length": 4}, "min_caption_length"),
        ({"placeholder_min_urls": 1}, "placeholder_min_urls"),
        ({"near_duplicate_bits": 64}, "near_duplicate_bits"),
        ({"held_out_bits": 17}, "held_out_bits"),
        ({"max_side_px": 8}, "max_side_px"),
        ({"max_caption_repeats": 0}, "max_caption_repeats"),
        ({"min_letter_fraction": 1.5}, "min_letter_fraction"),
        ({"language_min_probability": -0.1}, "language_min_probability"),
        ({"caption_languages": ("English",)}, "caption_languages: 'English'"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilterConfig(**wrong)
