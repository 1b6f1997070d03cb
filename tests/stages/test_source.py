"""Sources: every list format gives the same rows, shards partition them, and mistakes are named."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import pickle
import subprocess
import sys
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import shapes, storage
from stages.errors import InputError
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import Manifest
from stages.partitions import date_of, is_within
from stages.runner import run_stage
from stages.samples import table_from_bytes
from stages.shapes import ShapesConfig
from stages.source import Source, SourceConfig, _ranges
from tests.large_lists import write_large_list
from tests.s3_forwarding import ForwardingHandler, serving

ROWS = [
    {"url": f"https://example.org/{i}.jpg", "caption": caption, "licence": f"cc-{i}"}
    for i, caption in enumerate(["a cat", 'a "quoted", dog', "two\nlines", "1999", "ünïcode 猫", "NA", "true"])
]


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_delimited(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def write_json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


WRITERS: dict[str, Callable[[Path], None]] = {
    "parquet": write_parquet,
    "csv": write_delimited,
    "tsv": write_delimited,
    "json": write_json,
    "jsonl": write_json_lines,
}


def make(root: Path, *lists: Path | str, **settings: Any) -> Source:
    return Source(SourceConfig(lists=tuple(map(str, lists)), **settings), root=str(root / "store"))


def run(stage: Source) -> Manifest:
    return run_stage(stage, stage.fingerprint({}), {}, LocalExecutor(), ClusterConfig(executor="local"))


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [row for r in manifest.records for row in table_from_bytes(r.files["urls"].read(manifest.root)).to_pylist()]


@pytest.mark.parametrize("extension", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"pairs.{extension}"
    WRITERS[extension](path)
    manifest = run(make(tmp_path, path, extra_columns=("licence",), rows_per_shard=3))
    expected = [{"list": path.name, "row": i, **row} for i, row in enumerate(ROWS)]
    assert rows_of(manifest) == expected
    assert [record.num_in for record in manifest.records] == [3, 3, 1]
    assert manifest.num_kept == len(ROWS)


def test_compressed_lists(tmp_path: Path) -> None:
    plain = tmp_path / "pairs.csv"
    write_delimited(plain)
    packed = tmp_path / "pairs.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert [row["caption"] for row in rows_of(run(make(tmp_path, packed)))] == [row["caption"] for row in ROWS]


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
@pytest.mark.parametrize("first", ["url", "caption"])
def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path, name: str, first: str) -> None:
    """Captions of tables that are not quoted may begin with one."""
    captions = ["plain", '"lone quote', "other", "third", '"another', "last"]
    rows = [{"url": f"http://a/{i}.jpg", "caption": caption} for i, caption in enumerate(captions)]
    columns = [first, "caption" if first == "url" else "url"]
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = [delimiter.join(row[column] for column in columns) for row in rows]
    path = tmp_path / name
    for text in ("\n".join(lines) + "\n", "\n".join(lines[:4]) + "\n"):
        path.write_text(f"{delimiter.join(columns)}\n{text}")
        refused = r"row 1 holds what looks like further rows: .*quote.*not closed|Expected 2 columns, got 1"
        with pytest.raises(InputError, match=refused):
            run(make(tmp_path, path))


def test_values_of_several_lines_may_hold_urls(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('url,caption\nhttp://a/1.jpg,"one, two\nmore at https://shop.example"\nhttp://a/2.jpg,x\n')
    rows = rows_of(run(make(tmp_path, path)))
    assert [row["caption"] for row in rows] == ["one, two\nmore at https://shop.example", "x"]


def test_text_lists_have_urls_and_no_captions(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("\ufeffhttp://a/1.jpg\n\n  http://a/2.jpg \n\n")  # as Windows writes it
    rows = rows_of(run(make(tmp_path, path)))
    assert [(row["row"], row["url"], row["caption"]) for row in rows] == [
        (0, "http://a/1.jpg", None),
        (1, "", None),  # counted by the download as invalid_url, not skipped here
        (2, "http://a/2.jpg", None),
    ]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"URL": "http://a/1.jpg", "TEXT": "x"}\n{"URL": null, "TEXT": null}\n')
    rows = rows_of(run(make(tmp_path, path, url_column="URL", caption_column="TEXT")))
    assert [(row["url"], row["caption"]) for row in rows] == [("http://a/1.jpg", "x"), (None, None)]
    rows = rows_of(run(make(tmp_path, path, url_column="URL", caption_column=None)))
    assert [row["caption"] for row in rows] == [None, None]


@given(st.integers(0, 300), st.integers(1, 50))
def test_ranges_partition_the_rows(num_rows: int, rows_per_shard: int) -> None:
    rows = [row for start, stop in _ranges(num_rows, rows_per_shard) for row in range(start, stop)]
    assert rows == list(range(num_rows))
    assert all(0 < stop - start <= rows_per_shard for start, stop in _ranges(num_rows, rows_per_shard))


def test_names_of_work_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Stores that exist must be found again; the numbers were taken before lists were streamed."""
    for name in ("csv", "tsv", "json", "jsonl"):
        WRITERS[name](tmp_path / f"pairs.{name}")
    (tmp_path / "urls.txt").write_text("http://a/1.jpg\n\nhttp://a/2.jpg\n\n")
    names = ("pairs.csv", "pairs.tsv", "pairs.json", "pairs.jsonl", "urls.txt")
    stage = make(tmp_path, *(tmp_path / name for name in names), rows_per_shard=3)
    assert stage.fingerprint({}) == "85f4c1a3159d343f"
    assert " ".join(shard.id for shard in stage.plan({})) == (
        "ea0ff54930e5108b 747698061bea15b9 6e040d1002bad0d8 b4dcf76f0ffb0652 b43af2455281394b b38b1d0abea59ee8 "
        "e687914a8ecb855d 2edc1f5f836813bf 778b569c7161e574 e19e5e7109953090 965770ff343eccc3 d6f6c70cc02c7efe "
        "e760e01b3629e7e5"
    )


def test_appended_rows_and_lists_leave_old_shards_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    first = folder / "a.jsonl"
    write_json_lines(first)
    stage = make(tmp_path, folder, rows_per_shard=3)
    before = run(stage)
    first.write_text(first.read_text() + json.dumps(ROWS[0]) + "\n")
    write_json(folder / "b.json")
    later_stage = make(tmp_path, folder, rows_per_shard=3)
    later = run(later_stage)
    assert later.fingerprint != before.fingerprint
    assert [r.num_in for r in later.records] == [3, 3, 2, 3, 3, 1]
    for old, new in zip(before.records[:2], later.records[:2], strict=True):
        # The download identifies its work by the content of these files.
        assert old.files["urls"].sha256 == new.files["urls"].sha256


def test_a_moved_list_is_the_same_list(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    write_json(tmp_path / "pairs.json")
    write_json(tmp_path / "x" / "pairs.json")
    here, there = make(tmp_path, tmp_path / "pairs.json"), make(tmp_path, tmp_path / "x" / "pairs.json")
    assert here.fingerprint({}) == there.fingerprint({})
    assert [shard.id for shard in here.plan({})] == [shard.id for shard in there.plan({})]
    with pytest.raises(InputError, match=r"are both named 'pairs\.json'; give a folder that holds both"):
        make(tmp_path, tmp_path / "pairs.json", tmp_path / "x" / "pairs.json").plan({})
    both = make(tmp_path, tmp_path)
    assert len({shard.id for shard in both.plan({})}) == 2
    assert both.fingerprint({}) != here.fingerprint({})


def test_lists_in_dated_folders_come_and_go_without_renaming_others(tmp_path: Path) -> None:
    """The rows of a renamed list would be downloaded anew."""
    weeks = [tmp_path / "lists" / f"2026-11-{day}" / "urls.json" for day in ("01", "08", "15")]

    def ids() -> dict[str, str]:
        return {shard.params["list"]: shard.id for shard in make(tmp_path, tmp_path / "lists").plan({})}

    seen = []
    for week in weeks:
        week.parent.mkdir(parents=True)
        write_json(week)
        seen.append(ids())
    weeks[0].unlink()
    seen.append(ids())
    everything = seen[2]
    assert list(everything) == [f"{week.parent.name}/urls.json" for week in weeks]
    assert [len(known) for known in seen] == [1, 2, 3, 2]
    assert all(known.items() <= everything.items() for known in seen)


def test_relative_lists_are_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "pairs.json")
    monkeypatch.chdir(tmp_path)
    stage = make(tmp_path, "pairs.json")
    (shard,) = stage.plan({})
    travelled = pickle.loads(pickle.dumps(stage))
    assert travelled._open is None
    monkeypatch.chdir("/")
    assert travelled.process(shard, f"{tmp_path}/out").num_kept == len(ROWS)


def test_a_list_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_json_lines(path)
    (shard,) = make(tmp_path, path).plan({})
    path.write_text(path.read_text().replace("cat", "cow"))
    with pytest.raises(InputError, match="has changed since"):
        make(tmp_path, path).process(shard, f"{tmp_path}/out")


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.csv", b"URL,text\nhttp://a,b\n", {}, "source.url_column: 'url' .* URL, text; did you mean 'URL'"),
        ("a.csv", b"url,captoin\nhttp://a,b\n", {}, "source.caption_column: 'caption' .*did you mean 'captoin'"),
        ("a.csv", b"url,caption\nhttp://a,b\n", {"extra_columns": ("x",)}, "source.extra_columns: 'x'"),
        ("a.csv", b"url,caption\n", {}, "a.csv holds no rows"),
        ("a.csv", b"", {}, "a.csv is not a readable csv file"),
        ("a.csv", b"url,caption\nhttp://a,b,c\n", {}, "a.csv is not a readable csv file"),
        ("a.csv", b"url,caption\nhttp://a,\xff\xfe\n", {}, "a.csv is not a readable csv file"),
        ("a.parquet", b"no parquet", {}, "a.parquet is not a readable parquet file"),
        ("a.json", b'{"url": 1}', {}, "must hold a list of objects"),
        ("a.json", b"[1, 2", {}, "a.json is not a readable json file"),
        ("a.jsonl", b'{"url": "x"}\n{"url": \n', {}, "line 2"),
        ("a.jsonl", b'{"url": ["x"], "caption": "c"}\n', {}, "column 'url' of .* holds list.*, not text"),
        ("a.csv.gz", b"no gzip", {}, "a.csv.gz is not a readable csv file"),
        ("a.csv", b"url,caption,caption\nhttp://a,b,c\n", {}, "source.caption_column: .*a.csv has 2 columns named"),
        ("a.txt", b"", {}, "a.txt holds no rows"),
        ("a.txt", b"\xff\xfe", {}, "a.txt is not a readable txt file"),
        ("a.xlsx", b"x", {}, "must end in .parquet"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, content: bytes, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        make(tmp_path, path, **settings).plan({})


def test_missing_and_repeated_lists(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv is neither a file nor a folder"):
        make(tmp_path, tmp_path / "nowhere.csv").external()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is neither"):
        make(tmp_path, tmp_path / "empty").external()
    write_json(tmp_path / "pairs.json")
    with pytest.raises(InputError, match="given twice"):
        make(tmp_path, tmp_path / "pairs.json", tmp_path / "pairs.json").external()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "lists: empty"),
        ({"lists": ("a",), "rows_per_shard": 0}, "rows_per_shard"),
        ({"lists": ("a",), "extra_columns": ("key",)}, "extra_columns: 'key'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**settings)


def test_shapes_are_a_source(tmp_path: Path) -> None:
    config = ShapesConfig(num_images=25, port=8888)
    stage = Source(SourceConfig(kind="shapes", rows_per_shard=10, shapes=config), root=str(tmp_path))
    manifest = run(stage)
    rows = rows_of(manifest)
    assert [row["row"] for row in rows] == list(range(25))
    assert [row["url"] for row in rows] == [shapes.url_of(config, i) for i in range(25)]
    assert [row["caption"] for row in rows] == [shapes.picture_of(config, i).caption for i in range(25)]
    assert ShapesConfig(**manifest.metrics["shapes"]) == config
    more = Source(
        SourceConfig(kind="shapes", rows_per_shard=10, shapes=ShapesConfig(num_images=40, port=8888)),
        root=str(tmp_path),
    )
    ids, more_ids = [s.id for s in stage.plan({})], [s.id for s in more.plan({})]
    assert more_ids[:2] == ids[:2] and more.fingerprint({}) != stage.fingerprint({})
    reseeded = Source(stage.config, root=str(tmp_path), seed=1)
    assert reseeded.fingerprint({}) == stage.fingerprint({})


def changed(path: Path, tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> Source:
    """Write a list anew and return a source that has not read it yet."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make(tmp_path, path.parent, rows_per_shard=3, **settings)


def test_a_number_that_is_none_is_no_change(tmp_path: Path) -> None:
    path, columns = tmp_path / "lists" / "pairs.parquet", {"extra_columns": ("score",)}
    path.parent.mkdir()
    rows = {"url": ["http://h/1", "http://h/2"], "caption": ["one", "two"], "score": [float("nan"), 0.5]}
    pq.write_table(pa.table(rows), path)
    run(make(tmp_path, path.parent, **columns))
    pq.write_table(pa.table({name: [*values, values[0]] for name, values in rows.items()}), path)
    grown = make(tmp_path, path.parent, **columns)
    assert [change.num_changed for change in grown.changes()] == [0]
    rows["caption"][0] = "another"
    pq.write_table(pa.table(rows), path)
    (change,) = make(tmp_path, path.parent, **columns).changes()
    assert change.examples == ["row 0: caption 'one' -> 'another'"]


def test_changed_rows_are_refused_with_a_diff_unless_accepted(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "pairs.jsonl"
    before = run(changed(path, tmp_path, ROWS))
    rows = [dict(row) for row in ROWS]
    rows[1]["caption"], rows[4]["url"] = "another caption", "http://elsewhere/4.jpg"
    stage = changed(path, tmp_path, [*rows, ROWS[0]])
    (change,) = stage.changes()
    assert (change.num_before, change.num_after, change.num_changed) == (len(ROWS), len(ROWS) + 1, 2)
    with pytest.raises(
        InputError, match=r"(?s)pairs.jsonl: 2 of 7 rows changed.*row 1: caption .* -> 'another"
    ) as caught:
        stage.plan({})
    assert "row 4: url" in str(caught.value) and "source.changed_rows: accept" in str(caught.value)
    accepted = changed(path, tmp_path, rows, changed_rows="accept")
    after = run(accepted)
    # Only the shards of the changed rows are others.
    same = [
        old.files["urls"].sha256 == new.files["urls"].sha256
        for old, new in zip(before.records, after.records, strict=True)
    ]
    assert same == [False, False, True]
    assert changed(path, tmp_path, rows).changes() == []


def test_lists_may_grow_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "pairs.jsonl"
    assert changed(path, tmp_path, ROWS).changes() == []
    run(changed(path, tmp_path, ROWS))
    write_json(path.with_name("more.json"))
    stage = changed(path, tmp_path, [*ROWS, ROWS[0], ROWS[1]])
    assert [str(change) for change in stage.changes()] == [
        "pairs.jsonl: 2 rows added to 7",
        "more.json: new, 7 rows",
    ]
    run(stage)
    path.unlink()
    left = make(tmp_path, path.parent, rows_per_shard=3)
    assert [str(change) for change in left.changes()] == ["pairs.jsonl: gone, 9 rows leave the data set"]
    assert run(left).num_kept == len(ROWS)


def test_a_shortened_list_has_changed_and_a_rewritten_one_has_not(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "pairs.jsonl"
    run(changed(path, tmp_path, ROWS))
    with pytest.raises(InputError, match=r"2 of 7 rows changed\n.*row 5: .* is gone"):
        changed(path, tmp_path, ROWS[:5]).plan({})
    reordered = [dict(reversed(row.items())) for row in ROWS]
    assert changed(path, tmp_path, reordered).changes() == []
    # Cut otherwise, nothing can be compared and nothing is kept.
    other = make(tmp_path, path.parent, rows_per_shard=4)
    assert other.changes() == [] and len(other.plan({})) == 2


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("2026-11-08/urls.parquet", "2026-11-08"),
        ("date=2026-11-08/part-0.parquet", "2026-11-08"),
        ("2026/11/08/urls.csv", "2026-11-08"),
        ("year=2026/month=11/day=8/urls.csv", "2026-11-08"),
        ("crawl-2026-11-08T06.jsonl", "2026-11-08"),
        ("1234-56-78/2026-11-08.csv", "2026-11-08"),
        ("urls.parquet", None),
        ("12026-11-081.csv", None),
        ("2026-11/08.csv", None),
        ("2026-02-30.csv", None),
    ],
)
def test_a_list_is_of_the_day_that_its_name_says(name: str, date: str | None) -> None:
    assert str(date_of(name)) == str(date)


@given(
    days=st.lists(st.dates(), unique=True, max_size=6),
    bounds=st.lists(st.one_of(st.none(), st.dates()), min_size=2, max_size=2),
)
def test_ranges_of_days_are_sets_of_days(days: list[datetime.date], bounds: list[datetime.date | None]) -> None:
    since, until = bounds
    names = {f"{day.isoformat()}/urls.csv" for day in days}
    within = {name for name in names if is_within(name, since and since.isoformat(), until and until.isoformat())}
    assert within == {
        f"{day.isoformat()}/urls.csv"
        for day in days
        if (since or datetime.date.min) <= day <= (until or datetime.date.max)
    }


def test_a_range_of_days_leaves_other_lists_as_they_are(tmp_path: Path) -> None:
    lists, root = tmp_path / "lists", str(tmp_path / "store")
    for name in ("base", "2026-11-01", "2026-11-08", "2026-11-15"):
        (lists / name).mkdir(parents=True)
        (lists / name / "urls.csv").write_text(f"url,caption\nhttp://h/{name}.jpg,{name}\n")

    def source(**bounds: Any) -> Source:
        return Source(SourceConfig(lists=(str(lists),), **bounds), root=root)

    def ids(stage: Source) -> set[str]:
        return {shard.id for shard in stage.plan({})}

    whole, early, day = source(), source(until="2026-11-08"), source(since="2026-11-08", until="2026-11-08")
    assert ids(day) < ids(early) < ids(whole) and [len(ids(s)) for s in (day, early, whole)] == [1, 3, 4]
    assert len({stage.fingerprint({}) for stage in (day, early, whole)}) == 3
    assert source(until="2026-12-31").fingerprint({}) == whole.fingerprint({}), "lists count, not the range"
    assert list(early.partitions()) == [None, datetime.date(2026, 11, 1), datetime.date(2026, 11, 8)]
    with pytest.raises(InputError, match=r"none is of the days 2027-01-01 to now; correct source.since"):
        source(since="2027-01-01").plan({})

    run(whole)
    run(day)  # must not forget what the store knows of the others
    (lists / "2026-11-01" / "urls.csv").write_text("url,caption\nhttp://h/other.jpg,other\n")
    assert day.changes() == [] and run(day).num_kept == 1
    with pytest.raises(InputError, match=r"2026-11-01/urls.csv: 1 of 1 rows changed"):
        run(source(until="2026-11-01"))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"since": "yesterday"}, "since: 'yesterday' is not a date; write for example 2026-11-08"),
        ({"since": "20261108"}, "since: '20261108' is not a date"),
        ({"until": "2026-02-30"}, "until: '2026-02-30' is not a date"),
        ({"since": "2026-11-08", "until": "2026-11-01"}, "since: 2026-11-08 comes after until: 2026-11-01"),
    ],
)
def test_wrong_days_are_refused(bounds: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(lists=("x.csv",), **bounds)


# ---- ranges of rows -------------------------------------------------------------------------------------------------

MANY = 25_000  # rows: several parts of a stream


def write_many(path: Path) -> None:
    """Write rows whose types show only late: a number is whole in all parts but one, a column begins in the last."""
    rows: list[dict[str, Any]] = [
        {"url": f"http://h/{i}", "caption": f"{i}", "n": i, "o": {"a": i}} for i in range(MANY)
    ]
    rows[5] |= {"n": None, "caption": None}
    rows[21_000] |= {"n": 0.5, "late": [1], "o": {"b": "x"}}
    for row in rows[:20_000]:
        row["late"] = None
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7000)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_a_range_is_the_same_wherever_the_reader_comes_from(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"pairs.{extension}"
    write_many(path)
    stage = make(tmp_path, path, extra_columns=("n", "late", "o"), rows_per_shard=3000)
    shards = stage.plan({})
    orders = [shards, shards[::-1], [shards[i] for i in (7, 0, 8, 3, 4, 1, 2, 6, 5)]]
    found = []
    for order in orders:
        worker = make(tmp_path, path, extra_columns=("n", "late", "o"), rows_per_shard=3000)
        records = {shard.id: worker.process(shard, str(tmp_path / "out")) for shard in order}
        found.append([records[shard.id].files["urls"].sha256 for shard in shards])
    assert found[0] == found[1] == found[2]
    data = [(tmp_path / "out" / f"{shard.id}.parquet").read_bytes() for shard in shards]
    table = pa.concat_tables([table_from_bytes(item) for item in data])  # one schema, or this is refused
    assert table["row"].to_pylist() == list(range(MANY))
    assert table["url"].to_pylist() == [f"http://h/{i}" for i in range(MANY)]
    assert table["n"].to_pylist() == [None if i == 5 else 0.5 if i == 21_000 else float(i) for i in range(MANY)]
    assert table["late"][21_000].as_py() == [1] and table["late"].null_count == MANY - 1
    assert table["o"].type == pa.struct([("a", pa.int64()), ("b", pa.string())])


def test_only_the_row_groups_of_a_range_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write_many(path)
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 100] = bytes(100)
    path.write_bytes(content)
    stage = make(tmp_path, path, rows_per_shard=3500)
    first, *_, last = stage.plan({})
    assert stage.process(last, str(tmp_path / "out")).num_kept == MANY % 3500
    with pytest.raises(InputError, match=r"pairs\.parquet is not a readable parquet file"):
        stage.process(first, str(tmp_path / "out"))


def test_dictionaries_are_those_of_the_whole_list(tmp_path: Path) -> None:
    """As they were when lists were read whole: the download knows its work by the bytes of a shard."""
    path = tmp_path / "pairs.parquet"
    table = pa.Table.from_pylist(ROWS)
    table = table.set_column(2, "licence", table["licence"].dictionary_encode())
    pq.write_table(table, path, row_group_size=2)
    stage = make(tmp_path, path, extra_columns=("licence",), rows_per_shard=3)
    rows = table_from_bytes(run(stage).records[2].files["urls"].read(stage.root))
    assert rows["licence"].to_pylist() == ["cc-6"]
    assert len(rows["licence"].chunk(0).dictionary) == len(ROWS)


# ---- what reading lists costs ---------------------------------------------------------------------------------------


@contextmanager
def counting_proxy(endpoint: str) -> Iterator[tuple[str, Counter[str]]]:
    """Serve ``endpoint``; yield the address and the bytes of bodies that were read, by path."""
    num_bytes: Counter[str] = Counter()

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(endpoint).netloc

        def do_GET(self) -> None:
            answer = self.forward(self.body())
            if self.command == "GET":
                num_bytes[self.path.partition("?")[0]] += len(answer.content)
            self.answer(answer)

    with serving(Handler) as address:
        yield address, num_bytes


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl", "json"])
def test_work_on_s3_grows_with_the_lists_and_not_with_their_square(
    s3_root: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    """The driver reads a list to identify it and once more to count its rows; a worker reads it once."""
    num_lists = 6
    with counting_proxy(s3_server) as (address, num_bytes):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        plain = tmp_path / f"pairs.{extension}"
        WRITERS[extension](plain)
        for i in range(num_lists):
            storage.upload(plain, f"{s3_root}/lists/{i}/{plain.name}")
        config = SourceConfig(lists=(f"{s3_root}/lists",), rows_per_shard=3)
        driver = Source(config, root=str(tmp_path / "store"))
        driver.fingerprint({})
        shards = driver.plan({})
        assert len(shards) == 3 * num_lists
        planned = times_read(num_bytes, plain)
        worker = pickle.loads(pickle.dumps(driver))
        for shard in shards:
            worker.process(shard, str(tmp_path / "out"))
        assert planned == [1 if extension == "parquet" else 2] * num_lists
        assert times_read(num_bytes, plain) == [times + 1 for times in planned]


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_memory_does_not_grow_with_a_list(tmp_path: Path, extension: str) -> None:
    """Of 200 MiB of rows neither the driver that counts them nor the worker that writes some holds more than a part."""
    path = tmp_path / f"large.{extension}"
    num_rows = write_large_list(path, 200)
    assert path.stat().st_size > 170 * 2**20
    command = [sys.executable, "-m", "tests.large_lists", str(tmp_path / "store"), str(path), "3"]
    done = subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    found = json.loads(done.stdout)
    assert found["num_rows"] == num_rows
    assert found["plan_mib"] - found["at_rest_mib"] < 150
    assert found["peak_mib"] - found["at_rest_mib"] < 200


def times_read(num_bytes: Counter[str], plain: Path) -> list[float]:
    size = plain.stat().st_size
    return [count / size for path, count in sorted(num_bytes.items()) if path.endswith(plain.name)]
