"""The ledger over a real run of the data stages: every row once, in the state that the stages' own tables say."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.errors import InputError, IntegrityError
from stages.ledger import DECIDING, Ledger, LedgerConfig, tables_of, terminal_states
from stages.life import find_lives
from stages.manifest import Manifest
from stages.samples import table_from_bytes
from tests.stages.data_run import Pictures, run_data, serving, write_list

NUM_ROWS = 20


def rows_of(server: Pictures) -> list[tuple[str, str | None]]:
    """List twenty pictures, of which one is missing, one is a copy under another URL and one has no caption."""
    rows: list[tuple[str, str | None]] = [(server.url(i), f"picture {i}") for i in range(NUM_ROWS)]
    rows[3] = (server.url("missing"), "nothing")
    rows[9] = (server.url("4") + "?copy", "the fourth again")
    rows[14] = (rows[14][0], None)
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    folder = tmp_path_factory.mktemp("ledger")
    with serving() as server:
        write_list(folder / "lists" / "pairs.jsonl", rows_of(server))
        return run_data(str(folder / "store"), folder / "lists", curate={"keep_fraction": 0.75})


def ledger_of(manifest: Manifest) -> pa.Table:
    return pa.concat_tables(
        pq.read_table(io.BytesIO(record.files["ledger"].read(manifest.root))) for record in manifest.records
    )


def test_every_row_has_one_state_and_the_right_one(store: dict[str, Manifest]) -> None:
    rows = ledger_of(store["ledger"]).to_pylist()
    assert [row["row"] for row in rows] == list(range(NUM_ROWS))
    assert len({row["key"] for row in rows}) == NUM_ROWS
    fates = {row["row"]: (row["state"], row["stage"], row["reason"]) for row in rows}
    assert fates[3] == ("dropped", "download", "http_404")
    assert fates[9] == ("dropped", "filter", "duplicate")
    assert fates[14] == ("dropped", "filter", "no_caption")
    num_left = NUM_ROWS - 3
    states = Counter(fates.values())
    assert states[("kept", None, None)] == store["curate"].num_kept == -(-num_left * 3 // 4)
    assert states[("dropped", "curate", "keep_fraction")] == num_left - store["curate"].num_kept
    assert store["ledger"].metrics == {"num_rows": NUM_ROWS, "num_kept": store["curate"].num_kept}


def test_a_row_comes_with_what_its_stage_looked_at(store: dict[str, Manifest]) -> None:
    rows = ledger_of(store["ledger"]).to_pylist()
    scores = {row["row"]: json.loads(row["scores"]) for row in rows}
    kept = [scores[row["row"]]["clip_score"] for row in rows if row["state"] == "kept"]
    lost = [scores[row["row"]]["clip_score"] for row in rows if row["reason"] == "keep_fraction"]
    assert min(kept) >= max(lost)
    assert scores[3] == {}


def test_parts_are_kept_when_lists_grow(tmp_path: Path) -> None:
    root, lists = str(tmp_path / "store"), tmp_path / "lists"
    with serving() as server:
        write_list(lists / "a.jsonl", [(server.url(i), f"picture {i}") for i in range(8)])
        before = run_data(root, lists)
        write_list(lists / "b.jsonl", [(server.url(i), f"picture {i}") for i in range(8, 12)])
        after = run_data(root, lists)
    old, new = (set(manifests["ledger"].records[0].files.values()) for manifests in (before, after))
    assert old == new and ledger_of(after["ledger"]).num_rows == 12
    assert after["ledger"].records[0].wall_time_s == before["ledger"].records[0].wall_time_s  # not made again


def tables(store: Mapping[str, Manifest], number: int) -> dict[str, pa.Table]:
    files = list(tables_of(store).values())[number]
    return {stage: table_from_bytes(file.read(store["download"].root)) for stage, file in files.items()}


@pytest.mark.parametrize("stage", list(DECIDING)[1:])
def test_a_row_without_a_verdict_is_an_error(store: dict[str, Manifest], stage: str) -> None:
    own = tables(store, 0)
    assert terminal_states(own).num_rows == 8
    own[stage] = own[stage].slice(1)
    with pytest.raises(IntegrityError, match=f"{stage} was given"):
        terminal_states(own)


def test_a_shard_that_a_stage_gave_up_on_is_not_forgotten(store: dict[str, Manifest]) -> None:
    own = tables(store, 0)
    del own["embed"], own["curate"]
    fates = Counter(zip(*(terminal_states(own)[name].to_pylist() for name in ("stage", "reason")), strict=True))
    assert fates == {("download", "http_404"): 1, ("embed", "quarantined"): 7}
    (part,) = [
        shard
        for shard in Ledger(LedgerConfig(), root=store["source"].root).plan(without_last(store))
        if "urls" in shard.inputs
    ]
    record = Ledger(LedgerConfig(), root=store["source"].root).process(part, f"{store['source'].root}/elsewhere")
    assert record.dropped == {"download: quarantined": 4} and record.num_kept == 0


def without_last(store: dict[str, Manifest]) -> dict[str, Manifest]:
    """Return the manifests of a run whose download gave up on the last shard."""
    found = dict(store)
    for name in DECIDING:
        found[name] = replace(found[name], records=tuple(found[name].records)[:-1])
    found["download"] = replace(found["download"], quarantined={"some shard": "no network"})
    return found


def test_counts_that_differ_from_the_records_are_an_error(store: dict[str, Manifest]) -> None:
    stage = Ledger(LedgerConfig(), root=store["source"].root)
    with pytest.raises(IntegrityError, match="ledger: 9 rows of 'kept' where the stages counted 13"):
        stage.finish(store["ledger"].records[:-1], "unused", store)
    lost = replace(store["download"], quarantined={"some shard": "no network"})
    assert stage.finish(store["ledger"].records, "unused", store | {"download": lost}).metrics["num_rows"] == NUM_ROWS


def test_scores_can_be_left_out(store: dict[str, Manifest], tmp_path: Path) -> None:
    stage = Ledger(LedgerConfig(scores=False), root=store["source"].root)
    record = stage.process(stage.plan(store)[0], f"{store['source'].root}/elsewhere")
    table = table_from_bytes(record.files["ledger"].read(store["source"].root))
    assert "scores" not in table.column_names and "reason" in table.column_names


# ---- one life -------------------------------------------------------------------------------------------------------


def test_a_life_is_found_by_key_url_and_place(store: dict[str, Manifest]) -> None:
    rows = ledger_of(store["ledger"]).to_pylist()
    for name in (rows[5]["key"], rows[5]["url"], "pairs.jsonl:5"):
        (life,) = find_lives(store, name)
        assert (life.key, life.url, life.row, life.caption) == (rows[5]["key"], rows[5]["url"], 5, "picture 5")
    (lost,) = find_lives(store, "pairs.jsonl:3")
    assert [v.stage for v in lost.verdicts] == ["download"] and lost.state == "dropped by download: http_404"
    (copy,) = find_lives(store, "pairs.jsonl:9")
    assert copy.state == "dropped by filter: duplicate" and [v.reason for v in copy.verdicts] == [None, "duplicate"]
    kept = next(row for row in rows if row["state"] == "kept")
    (life,) = find_lives(store, kept["key"])
    assert life.state == "kept" and [verdict.stage for verdict in life.verdicts] == list(DECIDING)
    assert life.verdicts[0].scores["width"] == 32
    assert json.loads(json.dumps(life.to_json(), default=str))["state"] == "kept"


def test_a_life_is_told_as_far_as_it_has_come(store: dict[str, Manifest]) -> None:
    early = {name: store[name] for name in ("source", "download", "filter")}
    (life,) = find_lives(early, "pairs.jsonl:0")
    assert life.state == "passed filter" and not life.trained
    with pytest.raises(InputError, match="has not finished"):
        find_lives({"source": store["source"]}, "pairs.jsonl:0")


@pytest.mark.parametrize("name", ["0123456789000001", "http://nowhere/x.png", "pairs.jsonl:99", "nonsense"])
def test_nobody_of_that_name(store: dict[str, Manifest], name: str) -> None:
    with pytest.raises(InputError, match="no row is"):
        find_lives(store, name)
