"""How many requests of S3 a shard costs in every data stage, and by that a list of any length.

``python -m tests.benchmarks.bench_requests`` runs the data stages over a list cut into few shards, and over one cut
into many, on a real S3 server behind a proxy that counts. The difference is what shards cost; what a stage costs
besides, whatever their number, is printed beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

from stages.pca import Pca, PcaConfig
from tests.conftest import s3_environment, serving_s3
from tests.s3_forwarding import counting_proxy
from tests.stages import data_run
from tests.stages.small_store import run

_KINDS = ("PUT", "GET", "HEAD", "LIST", "DELETE")
_ROWS_PER_SHARD = 8


def measure(
    num_shards: int, folder: Path, pictures: data_run.Pictures, counts: Counter[str]
) -> dict[str, Counter[str]]:
    """Run the data stages over so many shards; return the requests of each."""
    folder.mkdir()
    lists = folder / "list.jsonl"
    data_run.write_list(lists, [(pictures.url(i), f"picture {i}") for i in range(num_shards * _ROWS_PER_SHARD)])
    root = f"s3://bucket/{folder.name}"
    rules = {"source": {"rows_per_shard": _ROWS_PER_SHARD}, "filter": {"placeholder_min_urls": None}}
    stages = data_run.stages_of(root, lists, **rules)
    stages["pca"] = Pca(PcaConfig(num_components=4, num_buckets=8, num_dot_buckets=8), root=root)
    found, requests = {}, {}
    for name, stage in stages.items():
        counts.clear()
        found[name] = run(stage, {upstream: found[upstream] for upstream in stage.upstream})
        requests[name] = Counter(counts)
    return requests


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs=2, default=[4, 16], metavar=("FEW", "MANY"))
    args = parser.parse_args()
    few, many = args.shards
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as name, data_run.serving() as pictures:
        folder = Path(name)
        (folder / "s3").mkdir()
        with serving_s3(folder / "s3") as endpoint, counting_proxy(endpoint) as (proxy, counts):
            os.environ |= s3_environment(proxy)
            found = [measure(number, folder / f"run{number}", pictures, counts) for number in (few, many)]
    print(f"requests per shard, and per stage besides (from {few} and {many} shards)")
    print(f"{'stage':10}" + "".join(f"{kind:>16}" for kind in _KINDS))
    totals: Counter[str] = Counter()
    for stage, one in found[0].items():
        if stage == "clip":  # the same for any list
            continue
        cells = []
        for kind in _KINDS:
            per_shard = (found[1][stage][kind] - one[kind]) / (many - few)
            totals[kind] += per_shard  # type: ignore[assignment]
            cells.append(f"{per_shard:9.2f} + {one[kind] - few * per_shard:4.0f}")
        print(f"{stage:10}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"{'all':10}" + "".join(f"{totals[kind]:9.2f}       " for kind in _KINDS))


if __name__ == "__main__":
    main()
