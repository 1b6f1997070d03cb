"""Trainings over several curated sets: what is mixed, what is refused, what counts as the same."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.errors import ConfigError, InputError, IntegrityError
from stages.executor import ClusterConfig, LocalExecutor
from stages.generator_config import DecoderTraining, UpsamplerTraining
from stages.manifest import Manifest
from stages.other_datasets import CuratedSet, OtherDataset
from stages.runner import run_stage
from stages.train import Decoder, Upsampler256
from stages.validation_config import ValidationConfig
from stages.warm_start import InitFrom
from stages.weights import weights_of
from tests.stages.training_data import DIM, manifests, put, write_dataset
from unclip_models.checkpoint import load_model
from unclip_models.settings import DecoderConfig, TextEncoderConfig, UNetConfig, UpsamplerConfig

COMMON: dict[str, Any] = {"num_steps": 3, "global_batch_size": 8, "num_streams": 4, "tensorboard": False}
UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
TEXT = TextEncoderConfig(context_length=8, width=16, layers=1, heads=2)
ATTENDING = dataclasses.replace(UNET, attention_resolutions=(4,), head_channels=8)
DECODER = DecoderTraining(model=DecoderConfig(image_size=8, embedding_dim=DIM, text=TEXT, unet=ATTENDING), **COMMON)
UPSAMPLER = UpsamplerTraining(
    model=UpsamplerConfig(image_size=16, input_size=8, crop_fraction=0.5, unet=UNET), **COMMON
)
FIRST_OF_OTHER = 100


def publish(
    root: str, sizes: Sequence[int], *, clip: bytes = b"clip", first_number: int = 0, **card: Any
) -> dict[str, Manifest]:
    """Write a store with finished clip, embed and curate stages."""
    found = manifests(root, write_dataset(root, sizes, first_number=first_number))
    weights = {"weights": put(root, "clip/clip.safetensors", clip)}
    found["clip"] = dataclasses.replace(found["clip"], files=weights, metrics={"embedding_dim": DIM} | card)
    found["embed"] = dataclasses.replace(
        found["clip"],
        stage="embed",
        files={},
        inputs={"clip": {"fingerprint": found["clip"].fingerprint, "digest": found["clip"].digest}},
    )
    embed = {"fingerprint": found["embed"].fingerprint, "digest": found["embed"].digest}
    found["curate"] = dataclasses.replace(found["curate"], inputs={"embed": embed})
    for manifest in found.values():
        manifest.write()
    return found


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Manifest]:
    return publish(str(tmp_path / "own"), (12, 20))


@pytest.fixture
def other(tmp_path: Path) -> dict[str, Manifest]:
    return publish(str(tmp_path / "other"), (9, 4), first_number=FIRST_OF_OTHER)


def mixed(config: Any, other: dict[str, Manifest], weight: float = 0.3) -> Any:
    dataset = OtherDataset(root=other["curate"].root, fingerprint=other["curate"].fingerprint, weight=weight)
    return dataclasses.replace(config, datasets=(dataset,))


def decoder(config: Any, own: dict[str, Manifest]) -> Decoder:
    return Decoder(config, root=own["curate"].root, seed=3)


def numbers(stage: Decoder, own: dict[str, Manifest], num_steps: int, **position: int) -> list[list[int]]:
    """Read which samples the steps see, by the value of their pixels."""
    shard = stage.plan(own)[0]
    with contextlib.closing(stage._stream(shard, None).batches(0, **position)) as batches:
        taken = list(itertools.islice(batches, num_steps))
    return [batch.tensors["image"][:, 0, 0, 0].tolist() for batch in taken]


def test_batches_hold_the_shares_whatever_the_world_size(own: dict[str, Manifest], other: dict[str, Manifest]) -> None:
    stage = decoder(mixed(DECODER, other), own)
    whole = numbers(stage, own, 20)
    counts = Counter(number >= FIRST_OF_OTHER for row in whole for number in row)
    assert counts == {True: 48, False: 112}  # 30% and 70% of 160, exactly
    halves = [numbers(stage, own, 20, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert {number for row in whole for number in row if number >= FIRST_OF_OTHER} == {
        *(100, 101, 102, 104, 105, 106, 108),
        *(109, 110, 111),
    }  # all that its curate kept


def test_it_trains_and_the_record_says_on_what(own: dict[str, Manifest], other: dict[str, Manifest]) -> None:
    stage = decoder(mixed(DECODER, other), own)
    fingerprint = stage.fingerprint({name: own[name].fingerprint for name in stage.upstream})
    inputs = {name: own[name] for name in stage.upstream}
    record = run_stage(stage, fingerprint, inputs, LocalExecutor(), ClusterConfig()).records[0]
    assert record.metrics["dataset_1"] == f"{other['curate'].uri} with weight 0.3"
    assert not any(file.path.startswith("other") for file in record.inputs.values())


def test_identity_is_what_the_data_sets_hold_and_their_weights(
    own: dict[str, Manifest], other: dict[str, Manifest], tmp_path: Path
) -> None:
    def identity(config: Any) -> tuple[str, str]:
        stage = decoder(config, own)
        return stage.fingerprint(dict.fromkeys(stage.upstream, "f")), stage.plan(own)[0].id

    shutil.copytree(tmp_path / "other", tmp_path / "moved")
    moved = {name: dataclasses.replace(m, root=str(tmp_path / "moved")) for name, m in other.items()}
    assert identity(mixed(DECODER, other)) == identity(mixed(DECODER, moved))
    different = publish(str(tmp_path / "third"), (9, 5), first_number=FIRST_OF_OTHER)
    all_of_them = [
        DECODER, mixed(DECODER, other), mixed(DECODER, other, 0.2), mixed(DECODER, different)
    ]  # fmt: skip
    for kind in range(2):
        assert len({identity(config)[kind] for config in all_of_them}) == len(all_of_them)


def test_another_clip_is_refused_unless_it_embeds_the_same(own: dict[str, Manifest], tmp_path: Path) -> None:
    foreign = publish(str(tmp_path / "foreign"), (9, 4), clip=b"another")
    with pytest.raises(ConfigError, match=r"decoder.datasets.0: its embeddings are of another CLIP .*clip.safetensors"):
        decoder(mixed(DECODER, foreign), own).plan(own)
    upsampler = Upsampler256(mixed(UPSAMPLER, foreign), root=own["curate"].root)
    assert upsampler.plan(own)  # it reads no embeddings
    golden = {"golden_fingerprint": "0123"}
    same = publish(str(tmp_path / "same"), (9, 4), clip=b"same but for its header", **golden)
    own["clip"] = dataclasses.replace(own["clip"], metrics={**own["clip"].metrics, **golden})
    assert decoder(mixed(DECODER, same), own).plan(own)


def test_what_is_not_there_or_too_small_is_refused(
    own: dict[str, Manifest], other: dict[str, Manifest], tmp_path: Path
) -> None:
    unknown = OtherDataset(root=other["curate"].root, fingerprint="f" * 16, weight=0.5)
    stage = decoder(dataclasses.replace(DECODER, datasets=(unknown,)), own)
    with pytest.raises(InputError, match=r"decoder.datasets.0: .*has no finished curate stage 'f+'; it has c{16}"):
        stage.fingerprint(dict.fromkeys(stage.upstream, "f"))
    small = publish(str(tmp_path / "small"), (3,))
    with pytest.raises(InputError, match=r"decoder.datasets.0: .*has 3 samples, fewer than num_streams: 4"):
        decoder(mixed(DECODER, small), own).plan(own)
    with pytest.raises(ValueError, match=r"datasets: the weights add up to 1; they must leave a share below 1"):
        mixed(DECODER, other, 1.0)


def test_a_data_set_that_changed_meanwhile_is_refused(own: dict[str, Manifest], tmp_path: Path) -> None:
    other = publish(str(tmp_path / "other"), (9, 4))
    stage = decoder(mixed(DECODER, other), own)
    shard = stage.plan(own)[0]
    publish(str(tmp_path / "other"), (9, 8))
    with pytest.raises(IntegrityError, match="changed since this training was planned"):
        stage._stream(shard, None)


def test_a_yardstick_is_validated_on_and_nothing_is_held_out(
    own: dict[str, Manifest], other: dict[str, Manifest]
) -> None:
    named = CuratedSet(root=other["curate"].root, fingerprint=other["curate"].fingerprint)

    def measured(num_samples: int = 10, **changes: Any) -> tuple[Decoder, Manifest]:
        validation = ValidationConfig(num_samples=num_samples, dataset=named)
        stage = decoder(dataclasses.replace(DECODER, validation=validation, **changes), own)
        used = {name: own[name] for name in stage.upstream}
        names = {name: manifest.fingerprint for name, manifest in used.items()}
        return stage, run_stage(stage, stage.fingerprint(names), used, LocalExecutor(), ClusterConfig())

    stage, trained = measured()
    shard = stage.plan(own)[0]
    held_out = stage._watch(shard, None, stage.build_model(shard)).held_out
    assert held_out is not None
    values = held_out.load(0, 10, whole=True).tensors["image"][:, 0, 0, 0].tolist()
    assert len(set(values)) == 10 and min(values) >= FIRST_OF_OTHER, "its samples, all that it has"
    record, cold = trained.records[0], run_cold(own)
    assert record.num_kept == cold.records[0].num_kept and "held_out" not in record.dropped
    looked, did_not = (load_model(Path(m.root) / weights_of(m).path)[0].state_dict() for m in (trained, cold))
    assert all((looked[name] == did_not[name]).all() for name in looked), "looking changes nothing"
    assert trained.fingerprint != cold.fingerprint, "but what was measured belongs to the result"
    assert "validation_loss" in record.metrics
    assert measured(learning_rate=1e-2)[1].records[0].metrics["validation_loss"] != record.metrics["validation_loss"]
    with pytest.raises(
        InputError, match=r"decoder.validation.dataset.0: .* has 10 samples, fewer than validation.num_"
    ):
        measured(11)
    shutil.rmtree(f"{named.root}/curate/{named.fingerprint}")
    with pytest.raises(InputError, match=r"decoder.validation.dataset.0: .* has no finished curate stage"):
        measured()
    with pytest.raises(ValueError, match="dataset: num_samples is 0"):
        ValidationConfig(dataset=named)


def run_cold(own: dict[str, Manifest]) -> Manifest:
    stage = decoder(DECODER, own)
    used = {name: own[name] for name in stage.upstream}
    names = {name: manifest.fingerprint for name, manifest in used.items()}
    return run_stage(stage, stage.fingerprint(names), used, LocalExecutor(), ClusterConfig())


def test_the_results_that_it_names_in_its_own_store_are_told(
    own: dict[str, Manifest], other: dict[str, Manifest]
) -> None:
    elsewhere = decoder(mixed(DECODER, other), own)
    assert elsewhere.named_results() == []
    config = dataclasses.replace(
        DECODER,
        datasets=(OtherDataset(fingerprint="a" * 16, weight=0.5),),
        validation=ValidationConfig(
            num_samples=4, dataset=CuratedSet(fingerprint="b" * 16, root=own["curate"].root + "/")
        ),
        init_from=InitFrom(fingerprint="c" * 16, stage="upsampler_256"),
    )
    named = [("curate", "a" * 16), ("curate", "b" * 16), ("upsampler_256", "c" * 16)]
    assert decoder(config, own).named_results() == named
