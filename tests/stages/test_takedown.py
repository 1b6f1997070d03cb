"""Takedowns on a real store: nothing of a sample is left, nothing else is lost, and it does not come back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import storage, takedown
from stages.base import record_uri
from stages.download import Download
from stages.errors import ConfigError, InputError, IntegrityError
from stages.gate import PromotionGateConfig
from stages.generator_config import DecoderTraining
from stages.life import find_lives
from stages.manifest import File, Manifest, ShardRecord, digest_of
from stages.registry import open_version, promote, register, rollback
from stages.samples import table_from_bytes
from stages.takedown import find_affected, take_down, widened
from stages.tombstones import Tombstones, add_tombstones, read_tombstones
from stages.train import Decoder
from stages.validation_config import SamplesConfig, ValidationConfig
from stages.withdrawn import read_withdrawn
from tests.stages.data_run import Pictures, picture, run_data, serving, write_list
from tests.stages.finished_run import publish_stage
from tests.stages.small_store import EMBEDDING_DIM, TEXT, unet
from tests.stages.small_store import run as run_tiny
from unclip_models.settings import DecoderConfig

NUM_ROWS = 20
ROWS = range(NUM_ROWS)


class Run:
    """A data set, by default of twenty pictures in three shards, run as often as a test wants."""

    def __init__(
        self, folder: Path, server: Pictures, name: str = "pairs.jsonl", rows: range = range(NUM_ROWS)
    ) -> None:
        self.folder, self.root, self.server = folder, str(folder / "store"), server
        self._lists = folder / name.removesuffix(".jsonl")
        self._name = name
        self.write([(server.url(i), f"picture {i}") for i in rows])

    def write(self, pairs: list[tuple[str, str]]) -> None:
        """Write the list."""
        write_list(self._lists / self._name, pairs)

    def __call__(self, **settings: Any) -> dict[str, Manifest]:
        return run_data(self.root, self._lists, **settings)

    def all_bytes(self) -> bytes:
        """Return everything in the store, uncompressed where it is Parquet, but the lists themselves."""
        found = b""
        for name in storage.list_files(self.root):
            if name.startswith(("source/", "takedown/")):
                continue
            data = storage.read_bytes(storage.join(self.root, name))
            found += str(table_from_bytes(data).to_pylist()).encode() if name.endswith(".parquet") else data
        return found


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with serving() as server:
        yield Run(tmp_path, server)


def key_of(manifests: dict[str, Manifest], row: int) -> str:
    (life,) = find_lives(manifests, f"pairs.jsonl:{row}")
    return life.key


def test_nothing_of_a_sample_is_left(run: Run) -> None:
    before = run()
    train(run.root, before["curate"])
    key = key_of(before, 9)
    assert picture(9) in run.all_bytes()
    stones = Tombstones(urls=frozenset({run.server.url(9)}))
    add_tombstones(run.root, stones, "asked for by its author")
    expected = find_affected(run.root, read_tombstones(run.root))
    assert [(s["key"], s["url"]) for s in expected.samples] == [(key, run.server.url(9))]
    assert [model["stage"] for model in expected.exposed.models] == ["prior"]
    affected = take_down(run.root, read_tombstones(run.root))
    assert affected == expected
    left = run.all_bytes()
    assert picture(9) not in left and b"'picture 9'" not in left
    assert picture(8) in left and picture(10) in left
    # What was made of that shard is gone, what was made of others is not.
    assert not any(storage.exists(storage.join(run.root, path)) for path in affected.derived)
    num_requests = sum(run.server.num_requests.values())
    after = run()
    assert sum(run.server.num_requests.values()) == num_requests, "nothing is downloaded again"
    (life,) = find_lives(after, "pairs.jsonl:9")
    assert life.state == "dropped by download: takedown" and life.caption is None
    assert after["curate"].num_kept == NUM_ROWS - 1 and after["ledger"].metrics["num_rows"] == NUM_ROWS
    same = [old.files == new.files for old, new in zip(before["embed"].records, after["embed"].records, strict=True)]
    assert same == [True, False, True]
    assert take_down(run.root, read_tombstones(run.root)).samples == []


def train(root: str, curate: Manifest, name: str = "prior", **config: Any) -> Manifest:
    """Publish a training that read a selection."""
    fingerprint = digest_of([name, curate.digest, config])[:16]
    weights = fingerprint.encode()
    return publish_stage(root, name, fingerprint, weights=weights, upstream={"curate": curate}, config=config)


def version_of(root: str, *manifests: Manifest) -> int:
    evaluate = publish_stage(root, "evaluate", manifests[0].fingerprint, metrics={"clip_score": 0.3})
    return register(root, {m.stage: m for m in (*manifests, evaluate)}, PromotionGateConfig()).number


def test_versions_that_learned_from_it_are_withdrawn(run: Run) -> None:
    """Also those that only started from such a version, or mixed its data in; not those made of other data."""
    first = run()
    other = Run(run.folder, run.server, "others.jsonl", rows=range(40, 52))()
    root = run.root
    learned = version_of(root, train(root, first["curate"]))
    promote(root, learned, PromotionGateConfig())
    started = version_of(root, train(root, other["curate"], init_from={"version": learned}))
    by_name = {"stage": "prior", "fingerprint": train(root, first["curate"]).fingerprint}
    by_fingerprint = version_of(root, train(root, other["curate"], "decoder", init_from=by_name))
    mixing = [{"fingerprint": first["curate"].fingerprint, "root": None, "weight": 0.5}]
    mixed = version_of(root, train(root, other["curate"], datasets=mixing))
    clean = version_of(root, train(root, other["curate"]))
    add_tombstones(root, Tombstones(urls=frozenset({run.server.url(9)})), "")
    affected = find_affected(root, read_tombstones(root))
    assert set(affected.exposed.versions) == {learned, started, by_fingerprint, mixed}
    assert not read_withdrawn(root), "looking changes nothing"
    take_down(root, read_tombstones(root))
    withdrawn = read_withdrawn(root)
    assert {number: withdrawal.models for number, withdrawal in withdrawn.items()} == {
        **dict.fromkeys((learned, started, mixed), ("prior",)),
        by_fingerprint: ("decoder",),
    }
    for number in withdrawn:
        with pytest.raises(InputError, match=rf"version {number} is withdrawn"):
            promote(root, number, PromotionGateConfig(), force_reason="we want it")
        with pytest.raises(InputError, match=rf"version {number} is withdrawn"):
            open_version(root, number)
    with pytest.raises(InputError, match="is withdrawn"):
        open_version(root, "production")
    assert open_version(root, clean)[0].number == clean
    assert promote(root, clean, PromotionGateConfig()).status == "promoted"
    with pytest.raises(InputError, match=rf"rollback: version {learned} is withdrawn"):
        rollback(root)
    take_down(root, read_tombstones(root))
    assert read_withdrawn(root) == withdrawn


def test_what_a_version_read_may_be_gone_at_the_moment(run: Run) -> None:
    """A stage that is done anew, or a takedown that was interrupted: nobody can tell what it held."""
    first = run()
    learned = version_of(run.root, train(run.root, first["curate"]))
    storage.delete(first["curate"].uri)
    add_tombstones(run.root, Tombstones(urls=frozenset({run.server.url(9)})), "")
    assert set(find_affected(run.root, read_tombstones(run.root)).exposed.versions) == {learned}


def test_pictures_that_a_training_drew_of_it_are_removed(run: Run) -> None:
    found = run()
    model = DecoderConfig(image_size=8, embedding_dim=EMBEDDING_DIM, text=TEXT, unet=unet(norm_groups=4))
    settings: dict[str, Any] = {
        "model": model,
        **{"num_steps": 1, "global_batch_size": 4, "num_streams": 4},
        "validation": ValidationConfig(num_samples=4),
        "samples": SamplesConfig(every_steps=1, num_samples=4, steps=2),
    }
    run_tiny(Decoder(DecoderTraining(**settings), root=run.root), found)
    unfinished = f"{run.root}/prior/shards/{'0' * 16}/samples/step-000001.png"
    storage.write_bytes(unfinished, b"of data that nobody recorded")
    in_wandb = f"{run.root}/prior/shards/{'0' * 16}/wandb/offline-run-1/files/media/images/samples_1.png"
    storage.write_bytes(in_wandb, b"of data that nobody recorded")
    folders = ("/samples/", "/tensorboard/", "/wandb/")
    drawn = {name for name in storage.list_files(run.root) if any(folder in name for folder in folders)}
    assert len(drawn) == 4, "the grid, TensorBoard's copy of it, and the two of the unfinished training"
    affected = take_down(run.root, Tombstones(urls=frozenset({run.server.url(9)})))
    assert set(affected.exposed.pictures) == drawn
    left = storage.list_files(run.root)
    assert not drawn & left.keys() and all(model["weights"] in left for model in affected.exposed.models)


@pytest.mark.parametrize("by", ["keys", "sha256"])
def test_a_sample_is_named_by_its_key_or_its_image(run: Run, by: str) -> None:
    manifests = run()
    (life,) = find_lives(manifests, "pairs.jsonl:3")
    value = life.key if by == "keys" else str(life.verdicts[0].scores["sha256"])
    take_down(run.root, Tombstones(**{by: frozenset({value})}))
    assert picture(3) not in run.all_bytes() and picture(4) in run.all_bytes()


def test_it_does_not_come_back(run: Run) -> None:
    (life,) = find_lives(run(), "pairs.jsonl:5")
    image = str(life.verdicts[0].scores["sha256"])
    add_tombstones(run.root, Tombstones(urls=frozenset({run.server.url(2)}), sha256=frozenset({image})), "")
    take_down(run.root, read_tombstones(run.root))
    storage.delete_tree(storage.join(run.root, "download"))
    run.server.num_requests.clear()
    again = run()
    for row in (2, 5):
        (life,) = find_lives(again, f"pairs.jsonl:{row}")
        assert life.state == "dropped by download: takedown" and life.caption is None
    assert picture(2) not in run.all_bytes() and picture(5) not in run.all_bytes()
    assert "/2.png" not in run.server.num_requests, "a tombstone of a URL spares its server"


@pytest.mark.parametrize("by", ["keys", "urls"])
def test_it_stays_away_when_the_list_grows_and_under_other_urls(run: Run, by: str) -> None:
    """A key is another one in a longer list, and a copy of the image has a URL of its own."""
    pairs = [(run.server.url(i), f"picture {i}") for i in ROWS]
    pairs[4] = (run.server.url(2) + "?copy", "a copy of picture 2")
    run.write(pairs)
    manifests = run()
    (life,) = find_lives(manifests, "pairs.jsonl:2")
    asked = Tombstones(**{by: frozenset({life.key if by == "keys" else run.server.url(2)})})
    meant = widened(run.root, asked)
    assert meant.urls == {run.server.url(2)} and len(meant.sha256) == 1 and meant.keys == asked.keys
    assert len(find_affected(run.root, meant).samples) == 2
    add_tombstones(run.root, meant, "")
    take_down(run.root, meant)
    assert picture(2) not in run.all_bytes()
    run.write([*pairs, (run.server.url(NUM_ROWS), "one more")])
    again = run()
    for row in (2, 4):
        (life,) = find_lives(again, f"pairs.jsonl:{row}")
        assert life.state == "dropped by download: takedown"
    assert picture(2) not in run.all_bytes() and picture(NUM_ROWS) in run.all_bytes()


def test_a_shard_on_its_way_is_caught(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The takedown comes when the shard has been fetched, and its record is not there yet."""
    stones = Tombstones(urls=frozenset({run.server.url(1)}))
    commit, num_commits = Download.commit, 0

    def overtaken(stage: Download, *args: Any, **named: Any) -> ShardRecord:
        nonlocal num_commits
        num_commits += 1
        if num_commits == 1:
            add_tombstones(run.root, stones, "")
            assert take_down(run.root, stones).samples == []
        return commit(stage, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Download, "commit", overtaken)
        manifests = run()
    (life,) = find_lives(manifests, "pairs.jsonl:1")
    assert life.state == "dropped by download: takedown"
    assert picture(1) not in run.all_bytes() and picture(0) in run.all_bytes()
    assert run.server.num_requests["/1.png"] == 1


def test_checkpoints_of_an_unfinished_training_are_named(run: Run) -> None:
    run()
    folder = "decoder/shards/0123456789abcdef/checkpoints"
    storage.write_bytes(storage.join(run.root, folder, "step-000004", "rank-0000.safetensors"), b"weights")
    stones = Tombstones(urls=frozenset({run.server.url(1)}))
    assert find_affected(run.root, stones).exposed.checkpoints == [folder]
    assert find_affected(run.root, Tombstones(urls=frozenset({"http://127.0.0.1/no"}))).exposed.checkpoints == []


def test_a_takedown_interrupted_anywhere_is_finished_by_the_next(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write and every deletion, pictures that were generated from the captions included."""
    manifests = run()
    publish_pictures(run.root, manifests)
    stones = Tombstones(urls=frozenset({run.server.url(1), run.server.url(17)}))
    pristine, num_deaths = run.folder / "pristine", 0
    shutil.copytree(run.root, pristine)
    while dies_after(num_deaths, run.root, stones, monkeypatch):
        take_down(run.root, stones)
        left = run.all_bytes()
        assert picture(1) not in left and picture(17) not in left, num_deaths
        assert b"picture 17" not in left and b"'picture 1'" not in left, num_deaths
        shutil.rmtree(run.root)
        shutil.copytree(pristine, run.root)
        num_deaths += 1
    assert num_deaths > 30
    assert run()["curate"].num_kept == NUM_ROWS - 2


def publish_pictures(root: str, manifests: dict[str, Manifest]) -> None:
    """Publish pictures generated from the captions of the last shard, as the generate stage does."""
    last = manifests["curate"].records[-1]
    path = "generate/shards/picture.tar"
    written = storage.write_bytes(storage.join(root, path), b"picture 17, drawn")
    inputs = {"embeddings": last.inputs["embeddings"], "selection": last.files["selection"]}
    files = {"images": File(path=path, sha256=written.sha256, num_bytes=written.num_bytes)}
    record = ShardRecord(shard_id="picture", files=files, inputs=inputs)
    storage.write_json(record_uri(storage.join(root, "generate", "shards"), "picture"), record.to_json())
    publish_stage(root, "generate", "0" * 16, [record], upstream={"curate": manifests["curate"]})


def dies_after(num_calls: int, root: str, stones: Tombstones, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Take down, but die before the call that follows so many; tell whether there was one."""
    num_left = num_calls
    with monkeypatch.context() as patch:
        for name in ("delete", "write_json", "write_bytes"):
            whole = getattr(storage, name)

            def dying(*args: Any, _whole: Any = whole) -> Any:
                nonlocal num_left
                if not num_left:
                    raise KeyboardInterrupt
                num_left -= 1
                return _whole(*args)

            patch.setattr(takedown.storage, name, dying)
        try:
            take_down(root, stones)
        except KeyboardInterrupt:
            return True
    return False


def test_batches_add_up_and_damage_stops(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert not read_tombstones(root)
    add_tombstones(root, Tombstones(urls=frozenset({"http://a/1.jpg"})), "one")
    add_tombstones(root, Tombstones(urls=frozenset({"http://a/2.jpg"}), sha256=frozenset({"0" * 64})), "two")
    found = read_tombstones(root)
    assert found.urls == {"http://a/1.jpg", "http://a/2.jpg"} and found.sha256 == {"0" * 64}
    storage.write_json(f"{root}/takedown/x.json", {"urls": 1})
    with pytest.raises(IntegrityError, match="not a batch of tombstones"):
        read_tombstones(root)


@pytest.mark.parametrize("wrong", [{"keys": frozenset({"x"})}, {"sha256": frozenset({"12ab"})}])
def test_wrong_names_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not one of"):
        Tombstones(**wrong)
