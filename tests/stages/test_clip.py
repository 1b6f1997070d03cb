"""Published weights are known by content; a training learns, and after a kill it goes on as if there had been none."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import storage
from stages.base import Progress
from stages.clip import Clip, ClipConfig, contrastive
from stages.errors import ConfigError, InputError
from stages.manifest import Manifest
from stages.runner import output_uri
from stages.training import TrainingStoppedError
from tests.stages.small_store import CLIP, CONTEXT_LENGTH, EMBEDDING_DIM, Given, publish_data, run, small_clip
from unclip_models.checkpoint import read_metadata
from unclip_models.clip import ClipModel
from unclip_models.randomness import SampleRandom

torch.set_num_threads(1)


def config(**values: Any) -> ClipConfig:
    small: dict[str, Any] = {
        "kind": "train",
        "model": CLIP,
        "num_steps": 6,
        "global_batch_size": 8,
        "num_streams": 2,
        "checkpoint_every_steps": 2,
        "log_every_steps": 2,
        "learning_rate": 3e-3,
        "tensorboard": False,
    }
    return ClipConfig(**(small | values))


def pretrained(name: object, **values: Any) -> ClipConfig:
    return ClipConfig(kind="pretrained", name=str(name), **values)


def weights_of(manifest: Manifest) -> ClipModel:
    with storage.local_copy(f"{manifest.root}/{manifest.records[0].files['weights'].path}") as path:
        return ClipModel.load(path)


def made_by(manifest: Manifest) -> dict[str, str]:
    """Return the checksums of what was made; the log of metrics holds times too."""
    return {role: file.sha256 for role, file in manifest.records[0].files.items() if role != "metrics"}


def test_own_weights_are_taken_over(root: str, tmp_path: Path) -> None:
    clip = small_clip()
    clip.save(tmp_path / "own.safetensors")
    manifest = run(Clip(pretrained(tmp_path / "own.safetensors"), root=root), {})
    found = weights_of(manifest)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), clip.parameters(), strict=True))
    assert manifest.metrics["embedding_dim"] == EMBEDDING_DIM
    assert manifest.metrics["context_length"] == CONTEXT_LENGTH
    assert manifest.metrics["image_size_px"] == CLIP.image_size
    assert len(manifest.metrics["golden_fingerprint"]) == 16
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_weights_are_known_by_content(tmp_path: Path) -> None:
    root, path = str(tmp_path / "store"), tmp_path / "own.safetensors"
    small_clip().save(path)
    first = Clip(pretrained(path), root=root)
    again = Clip(pretrained(path, num_steps=77, learning_rate=0.5, cache_dir="/x"), root=root, seed=3)
    assert first.fingerprint({}) == again.fingerprint({})
    assert first.plan({}) == again.plan({})
    before = first.fingerprint({}), first.plan({})[0].id
    torch.manual_seed(1)
    ClipModel.from_config(CLIP).save(path)
    after = first.fingerprint({}), first.plan({})[0].id
    assert before[0] != after[0] and before[1] != after[1]


def test_a_folder_of_weights_is_known_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    stage = Clip(pretrained(f"local-dir:{folder}"), root=str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        stage.external()
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    before = stage.external()
    (folder / "b.bin").write_bytes(b"weights")
    assert stage.external() != before


def test_a_missing_file_of_weights_is_refused_in_planning(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clip: .*/clip.safetensors: no such file on this machine"):
        Clip(pretrained(str(tmp_path / "clip.safetensors")), root=str(tmp_path)).external()


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clip\.name"):
        run(Clip(pretrained("ViT-X-99/openai"), root=str(tmp_path)), {})


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="name: missing for kind: pretrained"):
        ClipConfig(kind="pretrained")
    with pytest.raises(ValueError, match=r"quick_gelu: True is for kind: pretrained"):
        config(quick_gelu=True)
    with pytest.raises(ValueError, match="global_batch_size: 9 is not a multiple"):
        config(global_batch_size=9)


def test_it_learns_shapes(tmp_path: Path) -> None:
    root = str(tmp_path)
    data = publish_data(root, num_shards=2, num_rows=32, drop_every=100)
    seen: list[Progress] = []
    stage = Clip(config(num_steps=40, global_batch_size=16, ema_decay=0.8, checkpoint_every_steps=40), root=root)
    stage.report = seen.append
    (shard,) = stage.plan({"filter": data["filter"]})
    stage.process(shard, output_uri(stage))
    manifest = run(stage, {"filter": data["filter"]})
    lines = [json.loads(line) for line in manifest.records[0].files["metrics"].read(root).splitlines()]
    assert lines[-1]["step"] == 40 and lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert manifest.metrics["accuracy"] > 2 / 16
    assert (manifest.num_in, manifest.num_kept) == (64, 64)
    assert seen[-1].done == 40 and seen[-1].unit == "steps"
    assert read_metadata(f"{root}/{manifest.records[0].files['weights'].path}")["origin"] == "trained here"


def test_stopped_and_resumed_is_undisturbed(tmp_path: Path) -> None:
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    undisturbed = run(Clip(config(), root=whole), {"filter": publish_data(whole)["filter"]})
    data = publish_data(parts)["filter"]
    for num_calls in (1, 2):
        stage = Clip(config(), root=parts)
        (shard,) = stage.plan({"filter": data})
        calls = iter(range(100))
        with pytest.raises(TrainingStoppedError):
            stage.process(shard, output_uri(stage), should_stop=lambda n=num_calls, c=calls: next(c) >= n)  # type: ignore[misc]
    resumed = run(Clip(config(), root=parts), {"filter": data})
    assert made_by(resumed) == made_by(undisturbed)


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from stages.base import Progress
from stages.clip import Clip
from stages.runner import output_uri
from stages.manifest import Manifest
from tests.stages.test_clip import config
root, fingerprint = sys.argv[1:]
stage = Clip(config(num_steps=100, checkpoint_every_steps=10), root=root)
(shard,) = stage.plan({"filter": Manifest.read(root, "filter", fingerprint)})
stage.process(shard, output_uri(stage))
"""


@pytest.mark.slow
def test_killed_and_resumed_is_undisturbed(tmp_path: Path) -> None:
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    long = config(num_steps=100, checkpoint_every_steps=10)
    undisturbed = run(Clip(long, root=whole), {"filter": publish_data(whole)["filter"]})
    data = publish_data(parts)["filter"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, parts, data.fingerprint], env=environment)
    deadline = time.monotonic() + 300
    while not list(Path(parts).glob("clip/shards/*/checkpoints/*/checkpoint.json")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before its first checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(Path(parts).glob("clip/shards/*.json"))
    resumed = run(Clip(long, root=parts), {"filter": data})
    assert made_by(resumed) == made_by(undisturbed)


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    empty = Given("filter", str(tmp_path)).manifest([])
    with pytest.raises(InputError, match=r"0 samples passed the filters, fewer than clip\.num_streams: 2"):
        Clip(config(), root=str(tmp_path)).plan({"filter": empty})


def test_the_loss_and_its_terms() -> None:
    clip = ClipModel.from_config(CLIP)
    batch = {"image": torch.rand(4, 3, 32, 32) * 2 - 1, "tokens": clip.tokenize(["a", "b", "c", "a"])}
    loss, terms = contrastive(clip, batch, SampleRandom(0, 0, range(4)))
    assert loss.shape == () and loss.requires_grad
    assert all(term.dim() == 1 for term in terms.values())


def test_what_a_stage_needs_depends_on_the_kind(tmp_path: Path) -> None:
    trained, taken = Clip(config(), root=str(tmp_path)), Clip(pretrained("ViT-L-14/openai"), root=str(tmp_path))
    assert (trained.upstream, taken.upstream) == (("filter",), ())
    assert (trained.uses_seed, taken.uses_seed) == (True, False)
    assert pickle.loads(pickle.dumps(trained)).config == trained.config
    seeds = [Clip(config(), root=str(tmp_path), seed=seed).fingerprint({"filter": "f"}) for seed in (0, 1)]
    assert seeds[0] != seeds[1]
