"""What the data stages decide depends on the rows alone: not on shards, workers, their order, or tasks done twice."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.base import Progress, Shard, Stage
from stages.errors import InputError, StageError
from stages.executor import ClusterConfig, LocalExecutor, ShardFailure
from stages.manifest import Manifest, ShardRecord
from stages.runner import run_stage
from stages.samples import table_from_bytes
from tests.stages.data_run import Pictures, serving, stages_of, write_list

GONE = -1
# Of three pictures, so that many rows are duplicates; some captions are dropped, and some rows cannot be downloaded.
ROWS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, GONE]), st.sampled_from(["a red house", "a blue boat", "x", None])),
    min_size=1,
    max_size=14,
)
RULES = {
    "filter": {"min_caption_length": 2, "placeholder_min_urls": None, "near_duplicate_bits": 4},
    "curate": {"keep_fraction": 0.75},
}


class Crowd(LocalExecutor):
    """Workers with copies of the stage, which take shards in any order; some shards are done twice, side by side.

    Args:
        num_workers: at once.
        random: decides about the order, and which shards are done twice.
    """

    def __init__(self, num_workers: int, random: Random) -> None:
        super().__init__()
        self._num_workers, self._random = num_workers, random

    def map(
        self,
        stage: Stage[Any],
        shards: Sequence[Shard],
        output: str,
        on_progress: Callable[[Progress], None],
        **_: Any,
    ) -> Iterator[ShardRecord | ShardFailure]:
        order = list(shards)
        self._random.shuffle(order)
        twice = {shard.id for shard in order if self._random.random() < 0.5}

        def work(shard: Shard) -> ShardRecord:
            own = pickle.loads(pickle.dumps(stage))
            own.setup()
            return own.process(shard, output)  # type: ignore[no-any-return]

        with ThreadPoolExecutor(self._num_workers) as pool:
            again = {shard.id: pool.submit(work, shard) for shard in order if shard.id in twice}
            for future in as_completed([pool.submit(work, shard) for shard in order]):
                record = future.result()
                if record.shard_id in again:
                    assert again[record.shard_id].result().identity == record.identity
                yield record


@pytest.fixture(scope="module")
def pictures() -> Iterator[Pictures]:
    with serving() as server:
        yield server


def fates(rows: Sequence[tuple[int, str | None]], server: Pictures, rows_per_shard: int, crowd: Crowd) -> Any:
    """Run the data stages; return what became of every row of the list, or that nothing was left."""
    with tempfile.TemporaryDirectory() as folder:
        lists = Path(folder) / "lists" / "list.jsonl"
        # Another URL for every row, so that equal pictures are not one row twice.
        urls = [server.url("gone" if picture == GONE else picture) + f"?row={i}" for i, (picture, _) in enumerate(rows)]
        write_list(lists, [(url, caption) for url, (_, caption) in zip(urls, rows, strict=True)])
        found: dict[str, Manifest] = {}
        stages = stages_of(f"{folder}/store", lists, source={"rows_per_shard": rows_per_shard}, **RULES)
        try:
            for name, stage in stages.items():
                inputs = {upstream: found[upstream] for upstream in stage.upstream}
                fingerprint = stage.fingerprint({up: manifest.fingerprint for up, manifest in inputs.items()})
                executor = LocalExecutor() if name == "clip" else crowd
                found[name] = run_stage(stage, fingerprint, inputs, executor, ClusterConfig(backoff_s=0.0))
        except (InputError, StageError) as error:
            return f"{name}: {type(error).__name__}"
        tables = [
            table_from_bytes(record.files["ledger"].read(f"{folder}/store")) for record in found["ledger"].records
        ]
        lines = sorted((line for table in tables for line in table.to_pylist()), key=lambda line: line["row"])
        assert [line["url"] for line in lines] == urls  # every row has one end, and no other row has any
        assert sum(line["state"] == "kept" for line in lines) == found["curate"].num_kept
        return [(line["state"], line["stage"], line["reason"], line["caption"]) for line in lines]


@settings(deadline=None, max_examples=4)
@given(ROWS, st.integers(2, 14), st.integers(1, 4), st.integers(0, 2**32))
def test_nothing_but_the_rows_decides(
    pictures: Pictures, rows: list[tuple[int, str | None]], rows_per_shard: int, num_workers: int, seed: int
) -> None:
    calm = fates(rows, pictures, len(rows), Crowd(1, Random(0)))
    assert fates(rows, pictures, rows_per_shard, Crowd(num_workers, Random(seed))) == calm
    if isinstance(calm, list):
        assert all((stage == "download") == (rows[i][0] == GONE) for i, (_, stage, *_) in enumerate(calm))
