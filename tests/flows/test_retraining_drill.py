"""Three weeks of retraining, for real: each week only what is new is processed, and a poisoned week is refused.

Pictures of shapes come from a loopback server, every model is trained, a real Prefect server runs the flow. The
yardstick is the prior's loss on a set that never changes: with the captions of one week exchanged, it gets worse.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.cli import main
from flows.cli_registry import REFUSED
from flows.project import open_project
from stages import shapes, storage
from stages.manifest import Manifest
from stages.samples import table_from_bytes
from stages.weights import weights_of
from tests.stages.data_run import Pictures, serving, write_list
from tests.stages.small_store import SHAPES

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

TINY = Path(__file__).parents[1] / "tiny.yaml"
ROWS_PER_SHARD = 32
WEEKS = {"2026-11-01": range(0, 192), "2026-11-08": range(192, 288), "2026-11-15": range(288, 480)}
GOOD, BETTER, BAD = WEEKS
TRUSTED = range(5000, 5128)
DATA_STAGES = ("source", "download", "filter", "embed", "curate")
# Clean weeks lower the loss, from about 0.04 to 0.03; the poisoned one raises it by more than 0.04. It is not the same
# to the last digit in every run: the server's port is in the URLs, and with them in the order of the samples.
MAX_RISE = 0.02

SETTINGS: dict[str, Any] = {
    "cluster": {"executor": "local"},
    "download": {
        **{"image_size_px": 32, "image_format": "png", "image_quality": 1, "keep_encoded": True},
        **{"allowed_networks": ["127.0.0.0/8"], "backoff_s": 0.0, "retries": 0},
    },
    "curate": {"clip_score_min": -1.0, "keep_fraction": 1.0},  # or it would keep the poison from the gate
    "filter": {"near_duplicate_bits": None, "min_side_px": 16},
    "clip": {"num_steps": 150, "warmup_steps": 10, "checkpoint_every_steps": 150, "tensorboard": False},
    "prior": {
        **{"num_steps": 150, "global_batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 5, "ema_decay": 0.9},
        **{"checkpoint_every_steps": 150, "log_every_steps": 50, "tensorboard": False, "cpus_per_rank": 1},
        "init_from": {"version": "production"},
    },
    **{
        name: {
            **{"num_steps": 2, "warmup_steps": 1, "checkpoint_every_steps": 2, "tensorboard": False},
            "init_from": {"version": "production"},
        }
        for name in ("decoder", "upsampler_256", "upsampler_1024")
    },
    "generate": {"num_samples": 8, "until": "decoder"},
    "gate": {"rules": {"prior_validation_loss": {"max_rise": MAX_RISE}}},
}


def rows_of(server: Pictures, indices: range, *, poisoned: bool = False) -> list[tuple[str, str | None]]:
    """List pictures; poisoned: each with the caption of the next, none with its own."""
    captions = [shapes.picture_of(SHAPES, index).caption for index in indices]
    shown = captions[1:] + captions[:1] if poisoned else captions
    return [(server.url(index), caption) for index, caption in zip(indices, shown, strict=True)]


@dataclass(frozen=True)
class Trusted:
    """What all weeks are measured with: a CLIP trained on pictures that nobody doubts, and those, curated."""

    server: Pictures
    clip: str
    yardstick: dict[str, str]


def write_config(path: Path, root: Path, lists: Path, **sections: Any) -> str:
    source = {"kind": "urls", "rows_per_shard": ROWS_PER_SHARD, "lists": [str(lists)]}
    values = {**SETTINGS, "root": str(root), "source": source, **sections}
    path.write_text("\n".join([f"extends: {TINY}", *(f"{key}: {json.dumps(value)}" for key, value in values.items())]))
    return str(path)


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory, prefect_state: Path) -> Iterator[Trusted]:
    folder = tmp_path_factory.mktemp("trusted")
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(prefect_state))
        write_list(folder / "lists" / "pairs.jsonl", rows_of(server, TRUSTED))
        config = write_config(folder / "config.yaml", folder / "store", folder / "lists")
        assert main(["run", config, "--until", "curate"]) == 0
        done = open_project(config, []).manifests
        yardstick = {"root": str(folder / "store"), "fingerprint": done["curate"].fingerprint}
        yield Trusted(server, str(folder / "store" / weights_of(done["clip"]).path), yardstick)


class Drill:
    """A config whose lists grow week by week."""

    def __init__(self, folder: Path, trusted: Trusted, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.server, self._capsys = folder, trusted.server, capsys
        self.server.num_requests.clear()
        self.root = str(folder / "store")
        (folder / "weeks").mkdir()
        self.config = write_config(
            folder / "weekly.yaml",
            folder / "store",
            folder / "weeks",
            clip={"kind": "pretrained", "name": trusted.clip},
            prior={**SETTINGS["prior"], "validation": {"num_samples": 120, "dataset": trusted.yardstick}},
        )

    def append(
        self, week: str, *, name: str = "pairs.jsonl", poisoned: bool = False, rows: range | None = None
    ) -> None:
        path = self.folder / "weeks" / week / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_list(path, rows_of(self.server, rows or WEEKS[week], poisoned=poisoned))

    def answer(self, *arguments: str, code: int = 0) -> Any:
        self._capsys.readouterr()
        command, *rest = arguments
        found = main([command, *([] if command != "models" else [rest.pop(0)]), self.config, *rest, "--json"])
        said = self._capsys.readouterr()
        assert found == code, said.err
        return json.loads(said.out)

    def manifests(self) -> dict[str, Manifest]:
        return open_project(self.config, []).manifests

    def shards(self, stages: Sequence[str] = DATA_STAGES) -> dict[str, set[str]]:
        manifests = self.manifests()
        return {name: {record.shard_id for record in manifests[name].records} for name in stages}

    def written(self) -> dict[str, int]:
        """Return when every file of the stages was written."""
        entries = storage.list_entries(self.root)
        return {n: e.modified_ns for n, e in entries.items() if "/shards/" in n and "/segments/" not in n}

    def production(self) -> bytes:
        return storage.read_bytes(f"{self.root}/registry/production.json")


@pytest.fixture
def drill(tmp_path: Path, trusted: Trusted, capsys: pytest.CaptureFixture[str]) -> Drill:
    return Drill(tmp_path, trusted, capsys)


def test_three_weeks(drill: Drill) -> None:
    # Week 1: nothing is in production, so nothing can be started from or compared with.
    drill.append(GOOD)
    first = drill.answer("retrain")
    assert (first["status"], first["version"], first["production"], first["trained"]) == ("promoted", 1, 1, True)
    shards = drill.shards()
    assert {name: len(ids) for name, ids in shards.items()} == dict.fromkeys(DATA_STAGES, 6)
    written = drill.written()
    again = drill.answer("retrain")
    assert (again["status"], again["trained"]) == ("unchanged", False) and drill.written() == written

    # Week 2: its three shards alone are processed, and the models go on from version 1.
    drill.append(BETTER)
    second = drill.answer("retrain")
    assert (second["status"], second["version"], second["production"]) == ("promoted", 2, 2)
    check_only_new_shards(drill, shards, written, 3)

    # Week 3 is poisoned: every picture has the caption of another. Nothing before the gate can know.
    shards, written, production = drill.shards(), drill.written(), drill.production()
    drill.append(BAD, poisoned=True)
    third = drill.answer("retrain", code=REFUSED)
    assert (third["status"], third["version"], third["production"]) == ("refused", 3, 2)
    check_only_new_shards(drill, shards, written, 6)
    (rule,) = third["decision"]["rules"]
    assert rule["metric"] == "prior_validation_loss" and rule["bound"] == "max_rise" and not rule["passed"]
    assert rule["value"] > rule["production"] + MAX_RISE
    assert drill.production() == production, "a refusal leaves production as it was, byte for byte"
    assert drill.answer("retrain", code=REFUSED)["trained"] is False
    assert set(drill.server.num_requests.values()) == {1}, "every picture was asked for once in three weeks"
    ledger = drill.manifests()["ledger"]
    parts = [table_from_bytes(record.files["ledger"].read(drill.root)) for record in ledger.records]
    lists = Counter(name for part in parts for name in part["list"].to_pylist())
    assert lists == {f"{week}/pairs.jsonl": len(rows) for week, rows in WEEKS.items()}

    check_lineage(drill)

    # The same week with the right captions, as another list, passes: it was the poison that the gate has seen.
    (drill.folder / "weeks" / BAD / "pairs.jsonl").rename(drill.folder / "bad.jsonl")
    drill.append(BAD, name="corrected.jsonl")
    fourth = drill.answer("retrain")
    assert (fourth["status"], fourth["version"], fourth["production"]) == ("promoted", 4, 4)

    # Rollback: what a person takes back is not put into production again by the next retraining.
    assert drill.answer("rollback")["version"] == 2
    back = drill.answer("retrain")
    assert (back["status"], back["version"], back["production"], back["trained"]) == ("taken back", 4, 2, False)
    history = drill.answer("models", "list")["history"]
    picture = drill.folder / "circle.png"
    assert main(["generate", drill.config, "a red circle", "--version", "production", "-o", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.info["model_version"] == "2"
    assert [(change["action"], change["number"]) for change in history] == [
        *(("promote", number) for number in (1, 2, 4)),
        ("rollback", 2),
    ]
    scratch = drill.answer("retrain", "--from-scratch", "--no-promote")
    assert (scratch["status"], scratch["version"], scratch["production"]) == ("held", 5, 2)
    assert all(drill.manifests()[name].config["init_from"] is None for name in ("prior", "decoder"))


def check_only_new_shards(drill: Drill, before: dict[str, set[str]], written: dict[str, int], num_new: int) -> None:
    now = drill.shards()
    assert {name: len(ids - before[name]) for name, ids in now.items()} == dict.fromkeys(DATA_STAGES, num_new)
    assert all(before[name] <= now[name] for name in DATA_STAGES)
    after = drill.written()
    touched = [name for name in written if name.split("/")[0] in DATA_STAGES and after[name] != written[name]]
    assert touched == []


def check_lineage(drill: Drill) -> None:
    """From the store alone: what differs, what started where, why it was refused, which code it was."""
    difference = drill.answer("diff", "2", "3")
    assert [(item["name"], item["num_rows"]) for item in difference["added"]] == [(f"{BAD}/pairs.jsonl", 192)]
    assert difference["config"]["prior.init_from.version"] == [1, 2]
    before, after = difference["metrics"]["prior_validation_loss"]
    assert after > before + MAX_RISE
    versions = {version["number"]: version for version in drill.answer("models", "list")["versions"]}
    starts = {n: version["stages"]["decoder"]["config"]["init_from"] for n, version in versions.items()}
    assert starts[1] is None and (starts[2]["version"], starts[3]["version"]) == (1, 2)
    card = (Path(drill.root) / "registry/versions/0003.md").read_text()
    assert "NOT met: prior_validation_loss" in card and f"| `{BAD}/pairs.jsonl` | 192 |" in card
    assert all(version["stages"]["prior"]["code_version"] for version in versions.values())


def test_a_backfill_goes_day_by_day_and_is_taken_over(drill: Drill) -> None:
    for week in WEEKS:
        drill.append(week)
    drill.append(".", name="undated.jsonl", rows=range(600, 632))
    days = [BETTER, BAD]
    assert [(p["date"], p["status"]) for p in drill.answer("backfill", "--from", BETTER, "--dry-run")] == [
        (day, "pending") for day in days
    ]
    assert not drill.server.num_requests and not drill.written()

    drill.server.failing = {f"/{index}.png" for index in WEEKS[BAD]}
    assert [p["status"] for p in drill.answer("backfill", "--from", BETTER, code=1)] == ["processed", "failed"]
    drill.server.failing.clear()
    drill.server.num_requests.clear()
    assert [p["status"] for p in drill.answer("backfill", "--from", BETTER)] == ["done", "processed"]
    assert {f"/{index}.png" for index in WEEKS[BAD]} == drill.server.num_requests.keys()
    found = drill.answer("backfill", "--from", BETTER)
    assert [p["status"] for p in found] == ["done", "done"]

    # The first day and the list without a date are left; of the others every shard is taken over.
    by_day, written = shards_of(drill, found), drill.written()
    before = {name: set(kept) for name, kept in by_day.items()}
    drill.server.num_requests.clear()
    assert main(["run", drill.config, "--until", "embed"]) == 0
    fetched = {f"/{index}.png" for index in (*WEEKS[GOOD], *range(600, 632))}
    assert drill.server.num_requests.keys() == fetched
    now = drill.shards(("source", "download", "filter", "embed"))
    assert all(len(before[name]) == 9 for name in now)
    # A shard with a duplicate of a picture of another day, which only the whole data set shows, is embedded again.
    kept = {record.shard_id: record.num_kept for record in drill.manifests()["filter"].records}
    num_changed = sum(kept[shard_id] != num_kept for shard_id, num_kept in by_day["filter"].items())
    assert 0 < num_changed < 9
    new = {name: len(ids - before[name]) for name, ids in now.items()}
    assert new == {"source": 7, "download": 7, "filter": 7, "embed": 7 + num_changed}
    after = drill.written()
    assert [name for name, when in written.items() if after[name] != when and "filter/" not in name] == []


def shards_of(drill: Drill, partitions: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the shards that a backfill has made, with the samples they kept, from its own manifests."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for partition in partitions:
        for name, fingerprint in partition["stages"].items():
            manifest = Manifest.read(drill.root, name, fingerprint)
            assert manifest is not None
            found[name] |= {record.shard_id: record.num_kept for record in manifest.records}
    return found
