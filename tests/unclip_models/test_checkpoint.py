"""A model file describes itself: exact round trips for every model, and refusal of everything else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unclip_models.checkpoint import (
    build,
    config_from_dict,
    load_model,
    read_metadata,
    read_weights,
    save_model,
    write_weights,
)
from unclip_models.settings import (
    ARPriorConfig,
    DecoderConfig,
    DiffusionConfig,
    DiffusionPriorConfig,
    TextEncoderConfig,
    UNetConfig,
    UpsamplerConfig,
)

TEXT = TextEncoderConfig(context_length=5, width=16, layers=1, heads=2, vocab_size=30)
UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
CONFIGS = [
    DiffusionPriorConfig(embedding_dim=8, text=TEXT, width=16, layers=1, heads=2, embedding_scale=3.5),
    ARPriorConfig(
        embedding_dim=8, num_codes=4, num_buckets=6, num_dot_buckets=4, text=TEXT, width=16, layers=1, heads=2
    ),
    DecoderConfig(image_size=8, embedding_dim=8, unet=UNET, text=TEXT, null_embedding="learned"),
    UpsamplerConfig(image_size=32, input_size=16, unet=UNET, diffusion=DiffusionConfig(schedule="linear")),
]
DECODER, UPSAMPLER = CONFIGS[2], CONFIGS[3]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_round_trip_is_exact(config: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(config)
    save_model(model, tmp_path / "m.safetensors", metadata={"clip_fingerprint": "abc"})
    loaded, metadata = load_model(tmp_path / "m.safetensors")
    assert type(loaded) is type(model) and loaded.config == config and not loaded.training
    assert metadata["clip_fingerprint"] == "abc" == read_metadata(tmp_path / "m.safetensors")["clip_fingerprint"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype


def test_half_precision_weights_stay_half(tmp_path: Path) -> None:
    save_model(build(UPSAMPLER).to(torch.bfloat16), tmp_path / "m.safetensors")
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_loaded_model_computes_and_trains(tmp_path: Path) -> None:
    save_model(build(UPSAMPLER), tmp_path / "m.safetensors")
    loaded, _ = load_model(tmp_path / "m.safetensors")
    out = loaded(torch.zeros(1, 3, 8, 8), torch.tensor([3]), torch.zeros(1, 3, 4, 4))
    out.square().mean().backward()


def test_saving_replaces_the_file(tmp_path: Path) -> None:
    for config in (DECODER, UPSAMPLER):
        save_model(build(config), tmp_path / "m.safetensors")
    assert read_metadata(tmp_path / "m.safetensors")["architecture"] == "upsampler"


def rewritten(path: Path, **changes: str | None) -> Path:
    """Write the file again with another header; None removes a key."""
    header, tensors = read_weights(path)
    header = {key: value for key, value in {**header, **changes}.items() if value is not None}
    save_file(tensors, path, metadata=header)
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "gan"}, "unknown architecture 'gan'"),
        ({"architecture_version": "99"}, "version 99"),
        ({"architecture": None}, "not written by save_model"),
        ({"config": "{"}, "not JSON"),
        ({"config": '{"image_size": 8, "wings": 2}'}, r"config\.wings: no such field"),
        ({"config": '{"image_size": 8, "embedding_dim": 8}'}, r"config\.unet: missing"),
        ({"config": '{"image_size": 8, "embedding_dim": 8, "unet": {"size": 1}}'}, r"config\.unet\.size"),
    ],
)
def test_a_foreign_header_is_refused(changes: dict, match: str, tmp_path: Path) -> None:
    save_model(build(DECODER), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=match):
        load_model(rewritten(tmp_path / "m.safetensors", **changes))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_model(build(DECODER), tmp_path / "m.safetensors")
    wider = json.dumps(dataclasses.asdict(dataclasses.replace(DECODER, embedding_dim=9)))
    with pytest.raises(ValueError, match="image_to_time"):
        load_model(rewritten(tmp_path / "m.safetensors", config=wider))


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        load_model(path)
    save_model(build(UPSAMPLER), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        load_model(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(path)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model config"):
        build(TEXT)
    model = build(UPSAMPLER)
    with pytest.raises(ValueError, match="rename"):
        save_model(model, tmp_path / "m.safetensors", metadata={"config": "x"})
    with pytest.raises(ValueError, match="not a string"):
        save_model(model, tmp_path / "m.safetensors", metadata={"step": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_configs_survive_json(config: object) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_dict(type(config), values) == config


def test_build_makes_modules() -> None:
    assert all(isinstance(build(config), nn.Module) for config in CONFIGS)


def test_a_file_of_weights_is_as_open_as_any_other(tmp_path: Path) -> None:
    """The library makes it the owner's alone: a server under another user could not read it."""
    (tmp_path / "other").write_text("")
    write_weights(tmp_path / "weights.safetensors", {"x": torch.zeros(3)}, {})
    modes = [(tmp_path / name).stat().st_mode for name in ("other", "weights.safetensors")]
    assert modes[0] == modes[1]
    with pytest.raises(OSError, match="No such file"):
        write_weights(tmp_path / "nowhere" / "weights.safetensors", {"x": torch.zeros(3)}, {})
