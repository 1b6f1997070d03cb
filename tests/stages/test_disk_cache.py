"""The cache of remote files: each fetched once by whoever is first, the limit kept, nothing half or in use removed."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from stages import storage
from stages.dataset import TrainingStream
from stages.disk_cache import DiskCache
from stages.errors import IntegrityError, NotFoundError
from stages.manifest import File
from tests.chaos.s3_proxy import Schedule, faulty_proxy
from tests.stages.training_data import put, write_dataset


def files_of(store: Path, count: int, num_bytes: int = 1000) -> list[File]:
    return [put(str(store), f"f{i}", bytes([i]) * num_bytes) for i in range(count)]


def cached(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "lock"}


def use(cache: DiskCache, file: File, root: Path) -> bytes:
    with cache.local(file, str(root)) as path:
        return path.read_bytes()


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "cache"
    files, cache = files_of(store, 5), DiskCache(folder, 3000)
    for i in (0, 1, 2, 0, 3, 0, 4):
        assert use(cache, files[i], store) == bytes([i]) * 1000
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 3000
    assert cached(folder) == {files[i].sha256 for i in (0, 3, 4)}


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "cache"
    files, cache = files_of(store, 4), DiskCache(folder, 2000)
    with cache.local(files[0], str(store)) as first, DiskCache(folder, 2000).local(files[1], str(store)) as second:
        use(cache, files[2], store)
        assert first.exists() and second.exists()
    use(cache, files[3], store)
    assert cached(folder) == {files[2].sha256, files[3].sha256}


def test_a_file_is_read_from_the_store_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    file, cache = files_of(store, 1)[0], DiskCache(tmp_path / "cache", 5000)
    use(cache, file, store)
    (store / file.path).unlink()
    assert use(DiskCache(tmp_path / "cache", 5000), file, store) == b"\0" * 1000
    with pytest.raises(NotFoundError):
        use(DiskCache(tmp_path / "other", 5000), file, store)
    assert cached(tmp_path / "other") == set()


def test_damage_in_the_store_and_in_the_cache_is_noticed(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "cache"
    file, cache = files_of(store, 1)[0], DiskCache(folder, 5000)
    use(cache, file, store)
    os.truncate(folder / file.sha256, 10)
    assert len(use(cache, file, store)) == 1000  # fetched again
    (folder / file.sha256).unlink()
    (store / file.path).write_bytes(b"x" * 1000)
    with pytest.raises(IntegrityError, match=r"f0: differs from its record.*unclip repair"):
        use(cache, file, store)
    assert cached(folder) == set()


def test_threads_and_limits_under_contention(tmp_path: Path) -> None:
    """Eight threads with descriptors of their own, as eight ranks have, over a cache for three of nine files."""
    store, folder = tmp_path / "store", tmp_path / "cache"
    files = files_of(store, 9)

    def work(rank: int) -> bool:
        cache = DiskCache(folder, 3000)
        return all(use(cache, files[(rank * 5 + i) % 9], store)[0] == (rank * 5 + i) % 9 for i in range(60))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    use(DiskCache(folder, 3000), files[0], store)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3000
    assert not [name for name in cached(folder) if name.endswith(".part")]


_FETCHER = """
import sys, time
from pathlib import Path
from stages import storage
from stages.disk_cache import DiskCache
from stages.manifest import File

def slowly(uri, path):
    Path(path).write_bytes(Path(uri).read_bytes()[:500])
    print("half", flush=True)
    time.sleep(60)

storage.copy_to = slowly
root, folder, name, digest = sys.argv[1:]
with DiskCache(folder, 1500).local(File(name, digest, 1000), root):
    pass
"""


@pytest.fixture
def killed_fetch(tmp_path: Path) -> Iterator[tuple[Path, Path, list[File]]]:
    """Kill a process with SIGKILL in the middle of a fetch."""
    store, folder = tmp_path / "store", tmp_path / "cache"
    files = files_of(store, 2)
    command = [sys.executable, "-c", _FETCHER, str(store), str(folder), files[0].path, files[0].sha256]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None and process.stdout.readline() == b"half\n"
    (part,) = folder.glob("*.part")
    with part.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    yield store, folder, files


def test_a_fetch_killed_half_way_is_done_again(killed_fetch: tuple[Path, Path, list[File]]) -> None:
    store, folder, files = killed_fetch
    assert use(DiskCache(folder, 1500), files[0], store) == b"\0" * 1000
    assert cached(folder) == {files[0].sha256}


def test_what_a_killed_fetch_left_makes_room(killed_fetch: tuple[Path, Path, list[File]]) -> None:
    store, folder, files = killed_fetch
    use(DiskCache(folder, 1500), files[1], store)
    assert cached(folder) == {files[1].sha256}


def test_epochs_after_the_first_ask_the_store_for_nothing(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks of one host, three epochs, no room in memory: every file is read once in all."""
    shards = write_dataset(s3_root, (6,) * 4)
    schedule = Schedule(fraction=0.0)
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], schedule) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        counts = []
        for folder in (tmp_path / "cache", None):
            cache = None if folder is None else DiskCache(folder, 1 << 30)
            stream = TrainingStream(
                shards,
                root=s3_root,
                num_streams=2,
                global_batch_size=4,
                seed=0,
                image_size_px=8,
                embeddings=True,
                cache_gib=0.0,
                disk_cache=cache,
            )
            numbers = []
            for epoch in range(3):
                before = schedule.counts["ok"]
                for rank in range(2):
                    with closing(stream.batches(5 * epoch, rank, 2)) as batches:
                        assert len(list(itertools.islice(batches, 5))) == 5
                numbers.append(schedule.counts["ok"] - before)
            counts.append(numbers)
    with_cache, without = counts
    assert with_cache[0] > 0 and with_cache[1:] == [0, 0]
    assert min(without) >= with_cache[0] / 2  # it is the cache that made the difference
    num_files = len(cached(tmp_path / "cache"))
    assert num_files == 3 * len(shards)
    assert with_cache[0] <= 3 * num_files  # few requests a file, whoever asks first
    assert storage.exists(f"{s3_root}/{shards[0].selection.path}")
