"""Lists that go and grow, through every data stage: what is made of the other rows is not touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from stages import storage
from stages.manifest import Manifest
from stages.pca import Pca, PcaConfig
from stages.samples import table_from_bytes
from tests.stages.data_run import Pictures, run_data, serving, write_list
from tests.stages.small_store import run

STAGES = ("source", "download", "filter", "embed", "curate", "ledger", "pca")
LISTS = {"a.jsonl": range(0, 12), "b.jsonl": range(12, 24), "c.jsonl": range(24, 36)}
ROWS_PER_SHARD = 8


@pytest.fixture
def server() -> Iterator[Pictures]:
    with serving() as found:
        yield found


def write(folder: Path, name: str, rows: Iterable[int], server: Pictures) -> None:
    write_list(folder / name, [(server.url(i), f"picture {i}") for i in rows])


def finished(folder: Path, server: Pictures) -> tuple[str, Path, dict[str, Manifest], dict[str, str]]:
    """Bring all lists to their end; return the store, the folder of the lists, the manifests and the shards."""
    root, lists = str(folder / "store"), folder / "lists"
    for name, rows in LISTS.items():
        write(lists, name, rows, server)
    before = run_all(root, lists)
    server.num_requests.clear()
    return root, lists, before, shards_of(root)


def run_all(root: str, lists: Path) -> dict[str, Manifest]:
    found = run_data(root, lists, source={"rows_per_shard": ROWS_PER_SHARD})
    return found | {"pca": run(Pca(PcaConfig(num_components=4), root=root), found)}


def shards_of(root: str) -> dict[str, str]:
    """Return the version of every file of every shard: it changes whenever the file is written."""
    found: dict[str, str] = {}
    for stage in STAGES:
        entries = storage.list_entries(f"{root}/{stage}/shards")
        found |= {f"{stage}/{name}": entry.version for name, entry in entries.items() if "/" not in name}
    return found


def captions_of(ledger: Manifest) -> list[str]:
    """Return the captions of all rows that a ledger answers for."""
    tables = [table_from_bytes(file.read(ledger.root)) for record in ledger.records for file in record.files.values()]
    return sorted(caption for table in tables for caption in table["caption"].to_pylist())


def captions(*ranges: range) -> list[str]:
    return sorted(f"picture {i}" for rows in ranges for i in rows)


def test_a_removed_list_takes_its_rows_along_and_nothing_else(tmp_path: Path, server: Pictures) -> None:
    root, lists, before, written = finished(tmp_path, server)
    assert captions_of(before["ledger"]) == captions(*LISTS.values())
    (lists / "b.jsonl").unlink()
    after = run_all(root, lists)
    assert server.num_requests == {}
    assert shards_of(root) == written, "nothing is written, and nothing deleted: `unclip gc` does that"
    assert captions_of(after["ledger"]) == captions(LISTS["a.jsonl"], LISTS["c.jsonl"])
    for name in STAGES:
        assert after[name].fingerprint != before[name].fingerprint, name
        # Two of the six shards are those of the list; the others are the same, in the same order.
        ids = [record.shard_id for record in before[name].records]
        assert [record.shard_id for record in after[name].records] == ids[:2] + ids[4:], name
        assert (before[name].num_in, after[name].num_in) == (36, 24), name
    # Back again, it costs nothing either.
    write(lists, "b.jsonl", LISTS["b.jsonl"], server)
    again = run_all(root, lists)
    assert {name: m.digest for name, m in again.items()} == {name: m.digest for name, m in before.items()}
    assert server.num_requests == {} and shards_of(root) == written


def test_of_a_list_that_grows_the_last_partial_shard_is_done_again(tmp_path: Path, server: Pictures) -> None:
    root, lists, before, written = finished(tmp_path, server)
    write(lists, "b.jsonl", [*LISTS["b.jsonl"], *range(36, 46)], server)
    after = run_all(root, lists)
    # Rows 8 to 11 of the list, which were its partial shard, and those that are new.
    assert set(server.num_requests) == {f"/{i}.png" for i in [*range(20, 24), *range(36, 46)]}
    now = shards_of(root)
    assert {name: now[name] for name in written} == written
    for name in STAGES:
        ids = [record.shard_id for record in before[name].records]
        later = [record.shard_id for record in after[name].records]
        if name == "source":
            # A shard of it says which version of the list it was read from: all three are written, which is cheap.
            assert not set(later[2:5]) & set(ids) and later[:2] + later[5:] == ids[:2] + ids[4:]
        else:
            assert later[:3] + later[5:] == ids[:3] + ids[4:] and not set(later[3:5]) & set(ids), name
        assert after[name].num_in == 46, name
