"""Large URL lists, written without being held in memory, and a process that plans one and says what that took.

Called as ``large_lists.py ROOT LIST NUM_SHARDS``: plans, then reads that many shards from the middle of the list.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.resident import resident_mib

ROWS_PER_SHARD = 10_000
_ROW_BYTES = 200


def _captions(mib: int) -> Iterator[tuple[str, str]]:
    for i in range(mib * 2**20 // _ROW_BYTES):
        yield (
            f"https://host-{i % 977}.example/{i}.jpg",
            f"{hashlib.sha512(b'%d' % i).hexdigest()[:120]}, photograph {i}",
        )


def write_large_list(path: Path, mib: int) -> int:
    """Write about ``mib`` MiB of rows in the format that the name says; return their number."""
    rows = _captions(mib)
    count = 0
    if path.suffix == ".parquet":
        schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            # Few, large row groups, as most writers make them.
            while part := list(itertools.islice(rows, 200_000)):
                urls, captions = zip(*part, strict=True)
                writer.write_table(pa.table([pa.array(urls), pa.array(captions)], schema=schema))
                count += len(part)
        return count
    with path.open("w", newline="") as file:
        writer_of_rows = csv.writer(file)
        if path.suffix == ".csv":
            writer_of_rows.writerow(("url", "caption"))
        for url, caption in rows:
            if path.suffix == ".csv":
                writer_of_rows.writerow((url, caption))
            else:
                file.write(json.dumps({"url": url, "caption": caption}) + "\n")
            count += 1
    return count


def main(root: str, path: str, num_shards: int) -> None:
    from stages.source import Source, SourceConfig

    stage = Source(SourceConfig(lists=(path,), rows_per_shard=ROWS_PER_SHARD), root=root)
    at_rest_mib, started_at = resident_mib("VmHWM"), time.monotonic()
    stage.fingerprint({})
    shards = stage.plan({})
    found = {
        "num_rows": shards[-1].params["stop"],
        "at_rest_mib": at_rest_mib,
        "plan_s": time.monotonic() - started_at,
        "plan_mib": resident_mib("VmHWM"),
    }
    started_at, middle = time.monotonic(), len(shards) // 2
    for shard in shards[middle : middle + num_shards]:
        stage.process(shard, f"{root}/source/shards")
    print(json.dumps(found | {"read_s": time.monotonic() - started_at, "peak_mib": resident_mib("VmHWM")}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
