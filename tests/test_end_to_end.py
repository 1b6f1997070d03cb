"""The pipeline as its users run it: one command, real Ray, Prefect, DeepSpeed, HTTP and S3; killed again and again.

One run is left alone, its store on disk. Another has its store on a real S3 server and is killed with SIGKILL, Ray
included, in the middle of every kind of stage. Both must end with the same results.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from flows.cli import main
from stages import storage
from stages.config import load_config
from stages.graph import STAGE_NAMES, build_stages, fingerprints
from stages.manifest import Manifest
from stages.samples import read_tar, table_from_bytes
from tests.conftest import free_port, s3_environment
from unclip_models.checkpoint import load_model
from unclip_models.decoder import Decoder
from unclip_models.upsampler import Upsampler

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

TOP = Path(__file__).parents[1]
TINY = TOP / "tests" / "tiny.yaml"
RUN_TIMEOUT_S = 600
MODELS = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
# Where the run is killed: as soon as a file appears whose path below the root starts and ends so.
KILLS = [
    ("source/shards/", ".json"),
    ("download/shards/", ".json"),
    ("filter/shards/", ".json"),
    ("clip/shards/", "step-000006/checkpoint.json"),
    ("embed/shards/", ".json"),
    ("curate/shards/", ".json"),
    ("pca/shards/", ".json"),
    ("decoder/shards/", "step-000003/checkpoint.json"),
    ("generate/shards/", ".json"),
    ("evaluate/", ""),
]


@dataclass(frozen=True)
class Place:
    """A store and how to run the pipeline on it."""

    root: str
    watched: Path  # the folder of the store on this disk, S3 or not
    environment: dict[str, str]
    port: int
    config: Path = TINY  # that it was made with

    def command(self, *extra: str) -> list[str]:
        unclip = str(Path(sys.executable).with_name("unclip"))
        return [unclip, "run", str(TINY), "-s", f"root={self.root}", "-s", f"source.shapes.port={self.port}", *extra]

    def run(self, *extra: str) -> subprocess.CompletedProcess[str]:
        return self.execute(self.command(*extra))

    def execute(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = os.environ | self.environment
        folder = self.watched.parent
        return subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
        )

    def manifests(self) -> dict[str, Manifest]:
        stages = build_stages(load_config(TINY, [f"root={self.root}", f"source.shapes.port={self.port}"]))
        found = {name: Manifest.read(self.root, name, mark) for name, mark in fingerprints(stages).items()}
        return {name: manifest for name, manifest in found.items() if manifest is not None}


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()  # part of the URLs, and so of every fingerprint: the same in both runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, port: int, prefect_state: Path) -> Place:
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    config = folder.with_suffix(".yaml")
    place = Place(str(folder), folder, {"XDG_STATE_HOME": str(prefect_state)}, port, config)
    values = {"extends": str(TINY), "root": place.root, "source": {"shapes": {"port": port}}}
    config.write_text(json.dumps(values))  # JSON is YAML
    # With the installation that these tests have, wherever it lies.
    here = ("--directory", str(TOP), f"BIN={Path(sys.executable).parent}", "--old-file", ".venv/.installed")
    finished = place.execute(["make", *here, "quickstart", f"CONFIG={config}"])
    assert finished.returncode == 0, finished.stderr
    return place


def test_everything_is_there(undisturbed: Place) -> None:
    assert set(undisturbed.manifests()) == set(STAGE_NAMES)
    report = storage.read_bytes(storage.join(undisturbed.root, "report.html")).decode()
    assert report.startswith("<!doctype html>") or report.startswith("<!DOCTYPE html>")
    assert "http://" not in report.replace("http://www.w3.org", "") and "https://" not in report


def test_images_say_what_made_them(undisturbed: Place) -> None:
    manifests = undisturbed.manifests()
    record = manifests["generate"].records[0]
    for sample in read_tar(record.files["images"].read(undisturbed.root)):
        image = Image.open(io.BytesIO(sample.image))
        assert image.size == (64, 64)
        text = getattr(image, "text", {})
        assert text["caption"] == sample.caption and int(text["seed"]) >= 0
        weights = {name: manifests[name].records[0].files["weights"].sha256 for name in MODELS}
        assert json.loads(text["weights_sha256"]) == weights


def test_a_second_run_does_nothing(undisturbed: Place) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.watched.rglob("*") if path.is_file()}
    again = undisturbed.execute([undisturbed.command()[0], "run", str(undisturbed.config), "--json"])
    assert again.returncode == 0, again.stderr
    assert {stage["status"] for stage in json.loads(again.stdout)["stages"]} == {"cached"}
    assert {path: path.stat().st_mtime_ns for path in undisturbed.watched.rglob("*") if path.is_file()} == before


def test_generate_writes_a_picture(undisturbed: Place, tmp_path: Path) -> None:
    command = undisturbed.command()
    command[1:3] = ["generate", str(TINY)]
    target = tmp_path / "out.png"
    words = [*command, "a red circle on a blue background", "-n", "2", "--seed", "3", "-o", str(target)]
    finished = undisturbed.execute(words)
    assert finished.returncode == 0, finished.stderr
    assert list(tmp_path.glob("out*.png"))


def test_every_manipulation_and_exchange_of_weights(
    undisturbed: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: only the command is under test here, not how it starts."""
    config = [*undisturbed.command()[2:]]
    monkeypatch.chdir(undisturbed.watched.parent)

    def unclip(command: str, *words: str) -> str:
        assert main([command, *config, *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    record = undisturbed.manifests()["download"].records[0]
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, sample in zip(pictures, read_tar(record.files["images"].read(undisturbed.root)), strict=False):
        path.write_bytes(sample.image)
    first, second = map(str, pictures)
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")

    assert unclip("vary", first, "-n", "2", "-o", f"{tmp_path}/v.png").splitlines() == [
        f"{tmp_path}/v-1.png",
        f"{tmp_path}/v-2.png",
    ]
    with Image.open(tmp_path / "v-2.png") as image:
        assert image.text["seed"] == "1"  # type: ignore[attr-defined]
        used = json.loads(image.text["sampling"])["decoder"]  # type: ignore[attr-defined]
        assert used["sampler"] == "ddim" and used["eta"] > 0, "what was done, not what the config says"
    unclip("interpolate", first, second, "-n", "3", "-o", f"{tmp_path}/i.gif")
    with Image.open(tmp_path / "i.gif") as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    unclip("edit", first, "--to", "a red circle", "-n", "2", "--grid", "-o", f"{tmp_path}/e.png")
    with Image.open(tmp_path / "e.png") as image:
        assert image.size == (130, 64)
    unclip("edit", first, "--mask", f"{tmp_path}/mask.png", "--to", "a red circle", "-o", f"{tmp_path}/m.png")
    unclip("edit", first, "--zoom", "2", "-o", f"{tmp_path}/z.png")
    unclip("probe", first, "--components", "1,2", "-o", f"{tmp_path}/p.png")
    latents = tmp_path / "latents.safetensors"
    said = unclip("invert", first, "--latents", str(latents), "-o", f"{tmp_path}/r.png")
    assert "reconstruction error: 0." in said and latents.stat().st_size > 16 * 16 * 3 * 4
    assert json.loads(unclip("invert", first, "--json", "-o", f"{tmp_path}/r.png"))["output"] == f"{tmp_path}/r.png"

    exported = tmp_path / "exported"
    unclip("export", "--format", "safetensors", "-o", str(exported))
    for name, kind in (("decoder", Decoder), ("upsampler_1024", Upsampler)):
        assert isinstance(load_model(exported / f"{name}.safetensors")[0], kind)
    last = tmp_path / "last"
    unclip("export", "--format", "safetensors", "--step", "last", "-o", str(last))
    for path in exported.iterdir():
        found, wanted = load_model(last / path.name)[0], load_model(path)[0]
        assert all(map(torch.equal, found.parameters(), wanted.parameters()))
        # What is measured on the finished model depends on the number of threads in the last digits.
        torch.testing.assert_close(dict(found.named_buffers()), dict(wanted.named_buffers()))
    unclip("export", "--format", "safetensors", "--step", "9", "--only", "decoder", "-o", str(tmp_path / "earlier"))
    model, origin = load_model(tmp_path / "earlier" / "decoder.safetensors")
    assert isinstance(model, Decoder) and origin["steps"] == "9"
    assert main(["export", *config, "--format", "safetensors", "--step", "7", "-o", str(last)]) == 1
    assert "prior: there is no checkpoint of step 7; there are those of 9, 12" in capsys.readouterr().err
    assert main(["export", *config, "--format", "diffusers", "--only", "decoder", "-o", str(exported)]) == 2
    assert "diffusers has one number for all" in capsys.readouterr().err  # 8 channels: too narrow for it


def test_the_store_answers_for_every_row(
    undisturbed: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [*undisturbed.command()[2:]]
    monkeypatch.chdir(undisturbed.watched.parent)

    def unclip(command: str, *words: str) -> str:
        assert main([command, *config, *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    manifests = undisturbed.manifests()
    funnel = json.loads(unclip("funnel", "--json"))
    assert [stage["stage"] for stage in funnel] == ["source", "download", "filter", "embed", "curate"]
    assert all(before["kept"] == after["in"] for before, after in pairwise(funnel))
    assert "download" in unclip("funnel")
    ledger = manifests["ledger"].records[0].files["ledger"].read(undisturbed.root)
    rows = table_from_bytes(ledger).to_pylist()
    for row in (next(r for r in rows if r["state"] == "kept"), next(r for r in rows if r["state"] == "dropped")):
        (life,) = json.loads(unclip("explain", row["key"], "--json"))
        assert life["state"] == ("kept" if row["state"] == "kept" else f"dropped by {row['stage']}: {row['reason']}")
        assert life["trained"] == (list(MODELS) if row["state"] == "kept" else [])
        assert row["url"] in unclip("explain", row["key"])
    verified = json.loads(unclip("verify", "--json"))
    assert verified["findings"] == []
    assert json.loads(unclip("gc", "--json"))["garbage"] == []  # nothing is old enough
    unclip("export-embeddings", str(tmp_path / "embeddings"))
    assert len(list((tmp_path / "embeddings" / "img_emb").iterdir())) == len(manifests["curate"].records)
    takedown = json.loads(unclip("takedown", "--key", rows[0]["key"], "--json"))
    assert not takedown["applied"] and [model["stage"] for model in takedown["models"]] == sorted(MODELS)
    assert json.loads(unclip("verify", "--json"))["findings"] == []  # a look changes nothing


def test_an_ablation_trains_its_variants_and_judges_the_claims(
    undisturbed: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prefect_state: Path
) -> None:
    monkeypatch.chdir(undisturbed.watched.parent)
    monkeypatch.setenv("XDG_STATE_HOME", str(prefect_state))
    file = TINY.with_name("tiny_ablation.yaml")
    command = ["ablate", str(file), *undisturbed.command()[3:], "-s", "cluster.executor=local"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["trials"]) == 2 * (2 + 2)
    outcomes = {"holds", "does not hold", "not resolved"}
    assert len(found["verdicts"]) == 2 and {verdict["outcome"] for verdict in found["verdicts"]} <= outcomes
    assert main(command) == 0  # from what is there, in a moment
    said = capsys.readouterr()
    assert "| text_only |" in said.out and "done in" not in said.err
    page = undisturbed.watched / "ablation" / "tiny_ablation" / "index.html"
    assert "<svg" in page.read_text()


@pytest.fixture(scope="module")
def disturbed(s3_server: str, tmp_path_factory: pytest.TempPathFactory, port: int) -> Place:
    state = tmp_path_factory.mktemp("disturbed")  # a Prefect server of its own, which meets the same accidents
    root = f"s3://bucket/{state.name}"
    environment = s3_environment(s3_server) | {"XDG_STATE_HOME": str(state)}
    return Place(root, Path(os.environ["TEST_S3_FOLDER"]) / "bucket" / state.name, environment, port)


@pytest.mark.chaos
def test_killed_everywhere_it_ends_the_same(
    undisturbed: Place, disturbed: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, int] = {}
    for beginning, ending in KILLS:
        with killed_at(disturbed, beginning, ending):
            pass
        for name, modified in committed(disturbed.watched).items():
            assert kept.setdefault(name, modified) == modified, f"{name} was done twice"
    finished = disturbed.run()
    assert finished.returncode == 0, finished.stderr
    for name, modified in committed(disturbed.watched).items():
        assert kept.get(name, modified) == modified, f"{name} was done twice"
    for name, value in disturbed.environment.items():
        monkeypatch.setenv(name, value)
    results = {name: manifest.digest for name, manifest in disturbed.manifests().items()}
    assert results == {name: manifest.digest for name, manifest in undisturbed.manifests().items()}


@contextlib.contextmanager
def killed_at(place: Place, beginning: str, ending: str) -> Iterator[None]:
    """Run until a file of that name appears, then kill everything that runs, without warning."""
    environment = os.environ | place.environment
    process = subprocess.Popen(
        place.command(), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while not any(name.startswith(beginning) and name.endswith(ending) for name in names(place.watched)):
            assert process.poll() is None, f"the run ended before {beginning}...{ending} appeared"
            assert time.monotonic() < deadline, f"{beginning}...{ending} did not appear"
            time.sleep(0.02)
        yield
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=20)


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def committed(folder: Path) -> dict[str, int]:
    """Return the records of finished shards with the time they were written."""
    records = [path for path in folder.glob("*/shards/*.json") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in records}
