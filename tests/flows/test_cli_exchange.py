"""``unclip import`` and ``unclip export-embeddings``: what they read, write and refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from flows.cli import main
from flows.project import open_project
from stages.manifest import Manifest
from tests.stages.small_store import EMBEDDING_DIM, publish_data
from tests.unclip_models.small_stack import randomised, small_clip
from unclip_models.checkpoint import load_model
from unclip_models.diffusers_format import export_diffusers
from unclip_models.karlo_format import export_karlo
from unclip_models.prior import DiffusionPrior
from unclip_models.settings import ClipTextConfig, DiffusionPriorConfig

TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.fixture
def prior() -> DiffusionPrior:
    torch.manual_seed(0)
    config = DiffusionPriorConfig(
        embedding_dim=12,
        text=ClipTextConfig(context_length=16, width=32),
        width=64,
        layers=1,
        heads=1,
        embedding_scaling="mean_std",
        raw_embeddings=True,
    )
    model = randomised(DiffusionPrior(config))
    assert isinstance(model, DiffusionPrior)
    model.scaling.set_statistics(torch.linspace(-1, 1, 12), torch.linspace(1, 2, 12))
    return model


def test_a_karlo_checkpoint_comes_in_with_its_statistics_and_the_empty_caption(
    prior: DiffusionPrior, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = export_karlo(prior)
    torch.save((state.pop("clip_mean"), state.pop("clip_std")), tmp_path / "stats.th")
    torch.save({"state_dict": {f"model.{name}": x for name, x in state.items()}}, tmp_path / "prior.ckpt")
    clip = small_clip()
    clip.save(tmp_path / "clip.safetensors")
    words = ["import", f"{tmp_path}/prior.ckpt", "--kind", "prior", "-o", f"{tmp_path}/ours.safetensors"]
    assert main([*words, "--stats", f"{tmp_path}/stats.th", "--clip", f"{tmp_path}/clip.safetensors"]) == 0
    assert "DiffusionPrior of" in capsys.readouterr().out
    model, metadata = load_model(tmp_path / "ours.safetensors")
    assert metadata["imported_from"].endswith("prior.ckpt") and model.config == prior.config
    assert torch.equal(model.scaling.std, prior.scaling.std)
    raw = clip.encode_text(clip.tokenize([""]), normalize=False)[0]
    torch.testing.assert_close(model.text_encoder.null_embedding, raw)
    assert main(words) == 1
    assert "a prior needs the mean and standard deviation" in capsys.readouterr().err


def test_a_diffusers_folder_comes_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = DiffusionPriorConfig(
        embedding_dim=12, text=ClipTextConfig(context_length=5, width=12), width=16, layers=1, heads=2
    )
    model = DiffusionPrior(config)
    export_diffusers(model, tmp_path / "theirs")
    target = f"{tmp_path}/ours.safetensors"
    assert main(["import", f"{tmp_path}/theirs", "--kind", "prior", "-o", target]) == 0
    assert load_model(target)[0].config == config
    assert main(["import", f"{tmp_path}/theirs", "--kind", "upsampler", "-o", target]) == 1
    assert "holds a DiffusionPrior, not a upsampler" in capsys.readouterr().err
    assert main(["import", f"{tmp_path}/nowhere.ckpt", "--kind", "prior", "-o", target]) == 1
    assert "no such file" in capsys.readouterr().err


def test_embeddings_go_out_once_curate_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(TINY), f"{tmp_path}/out", "-s", f"root={tmp_path}/store", "-s", "source.shapes.num_images=40"]
    assert main(["export-embeddings", *words]) == 1
    assert "curate not finished; `unclip run --until curate`" in capsys.readouterr().err
    publish_results(str(tmp_path / "store"), words)
    assert main(["export-embeddings", *words]) == 0
    assert "out: embeddings of 32 samples" in capsys.readouterr().out
    kept = pq.read_table(tmp_path / "out" / "metadata")["image_path"].to_pylist()
    assert main(["export-embeddings", *words]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["export-embeddings", words[0], f"{tmp_path}/every", *words[2:], "--all"]) == 0
    every = pq.read_table(tmp_path / "every" / "metadata")["image_path"].to_pylist()
    assert len(kept) == 32 and len(every) == 40 and [key for key in every if key in set(kept)] == kept
    assert np.load(tmp_path / "every" / "img_emb" / "img_emb_1.npy").shape == (20, EMBEDDING_DIM)


def publish_results(root: str, words: list[str]) -> None:
    """Publish the data stages as finished, under the names that the config gives them."""
    project = open_project(words[0], words[3::2])
    given = publish_data(root)
    done: dict[str, Manifest] = {}
    for name in ("source", "download", "filter", "clip", "embed", "curate"):
        stage = project.stages[name]
        done[name] = Manifest(
            root=root,
            stage=name,
            version=stage.version,
            fingerprint=project.fingerprints[name],
            config={},
            inputs={u: {"fingerprint": done[u].fingerprint, "digest": done[u].digest} for u in stage.upstream},
            records=given[name].records if name in given else (),
        )
        done[name].write()
