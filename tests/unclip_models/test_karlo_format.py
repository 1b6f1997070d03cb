"""Karlo's and ADM's layout: what goes out comes back, shapes are read off the weights, and nothing is executed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.unclip_models.small_stack import randomised
from unclip_models.decoder import Decoder
from unclip_models.karlo_format import ImportOptions, export_karlo, import_karlo, infer_unet, read_checkpoint
from unclip_models.prior import DiffusionPrior
from unclip_models.settings import (
    ClipTextConfig,
    DecoderConfig,
    DiffusionConfig,
    DiffusionPriorConfig,
    TextEncoderConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_models.unet import UNet
from unclip_models.upsampler import Upsampler

torch.set_num_threads(1)
UNETS = {
    "karlo": UNetConfig(model_channels=32, channel_mult=(1, 2, 3), num_res_blocks=2, norm_group_min_channels=1),
    "paper_1024": UNetConfig(
        model_channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=1, use_scale_shift_norm=False,
        norm_group_min_channels=1,
    ),
    "strided": UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=3, resblock_updown=False, norm_group_min_channels=1
    ),
}  # fmt: skip


def _decoder() -> Decoder:
    torch.manual_seed(0)
    unet = UNetConfig(
        model_channels=32, channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(8, 4), head_channels=32,
        norm_group_min_channels=1,
    )  # fmt: skip
    config = DecoderConfig(
        image_size=16, embedding_dim=12, unet=unet, text=ClipTextConfig(context_length=5, width=20), context_width=24,
        null_embedding="learned", embedding_scale=1.0, raw_embeddings=True,
        diffusion=DiffusionConfig(variance="learned_range"),
    )  # fmt: skip
    return randomised(Decoder(config)).eval()


def _prior() -> DiffusionPrior:
    torch.manual_seed(0)
    config = DiffusionPriorConfig(
        embedding_dim=12, text=ClipTextConfig(context_length=5, width=20), width=96, layers=2, heads=3,
        embedding_scaling="mean_std", raw_embeddings=True,
    )  # fmt: skip
    prior = randomised(DiffusionPrior(config)).eval()
    prior.scaling.set_statistics(torch.linspace(-1, 1, 12), torch.linspace(0.5, 1.5, 12))
    return prior


def _equal(model: nn.Module, other: nn.Module) -> None:
    assert model.config == other.config
    expected = model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("learned", [False, True])
def test_an_upsampler_comes_back_from_its_weights_alone(name: str, learned: bool) -> None:
    config = UpsamplerConfig(
        image_size=64, input_size=16, enlarge_mode="bicubic", unet=UNETS[name],
        diffusion=DiffusionConfig(schedule="linear", variance="learned_range" if learned else "fixed_small"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomised(Upsampler(config))
    state = {f"model_first_steps.{key}": x for key, x in export_karlo(model).items()}
    state |= {f"model_last_step.{key}": torch.zeros_like(x) for key, x in export_karlo(model).items()}
    options = ImportOptions(image_size=64, input_size=16, schedule="linear")
    _equal(model, import_karlo(state, "upsampler", options))


def test_a_decoder_comes_back_and_keeps_attention_as_convolutions_outside() -> None:
    model = _decoder()
    state = export_karlo(model)
    assert state["input_blocks.4.1.qkv.weight"].shape == (192, 64, 1)
    assert {"cf_param", "clip_tok_proj.weight", "text_seq_proj.1.bias"} <= state.keys()
    options = ImportOptions(image_size=16, head_channels=32, context_length=5)
    _equal(model, import_karlo({f"model.{key}": x for key, x in state.items()}, "decoder", options))


def test_a_prior_comes_back_with_its_statistics() -> None:
    model = _prior()
    state = export_karlo(model)
    statistics = (state.pop("clip_mean"), state.pop("clip_std"))
    options = ImportOptions(head_channels=32)
    _equal(model, import_karlo(state, "prior", options, statistics=statistics))
    with pytest.raises(ValueError, match="a prior needs the mean and standard deviation"):
        import_karlo(state, "prior", options)


def test_the_priors_attention_is_interleaved_by_head_outside() -> None:
    """One head's q, k and v follow each other in Karlo; here all q come first."""
    model = _prior()
    ours = model.state_dict()["transformer.blocks.1.attention.qkv.weight"]
    theirs = export_karlo(model)["transformer.resblocks.1.attn.c_qkv.weight"]
    for head in range(3):
        for part in range(3):
            rows = theirs[(head * 3 + part) * 32 : (head * 3 + part + 1) * 32]
            assert torch.equal(rows, ours[part * 96 + head * 32 : part * 96 + (head + 1) * 32])


@pytest.mark.parametrize("name", UNETS)
def test_shapes_are_read_off_the_weights(name: str) -> None:
    unet = UNet(UNETS[name], image_size=64, in_channels=6)
    assert infer_unet(unet.state_dict(), ImportOptions(), 64) == UNETS[name]


def test_files_of_both_kinds_are_read_and_code_is_refused(tmp_path: Path) -> None:
    state = {"model.x": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["model.x"], state["model.x"])

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("executed",))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match=r"bomb\.ckpt: cannot be read as plain weights"):
        read_checkpoint(tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="does not hold named tensors"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_other_weights_and_models_are_refused() -> None:
    state: dict[str, Tensor] = export_karlo(_decoder())
    with pytest.raises(ValueError, match="it is not of this kind"):
        import_karlo(state, "prior", statistics=(torch.zeros(12), torch.ones(12)))
    with pytest.raises(ValueError, match="kind 'clip': choose from prior, decoder, upsampler"):
        import_karlo(state, "clip")
    options = ImportOptions(image_size=16, head_channels=32)
    with pytest.raises(ValueError, match=r"lacks \['out.0.bias'\]"):
        import_karlo({name: x for name, x in state.items() if name != "out.0.bias"}, "decoder", options)
    with pytest.raises(ValueError, match=r"has unknown \['more'\]"):
        import_karlo({**state, "more": torch.zeros(1)}, "decoder", options)
    text = TextEncoderConfig(context_length=5, width=12, layers=1, heads=2)
    with pytest.raises(ValueError, match="Karlo's models read the frozen CLIP's text"):
        export_karlo(DiffusionPrior(DiffusionPriorConfig(embedding_dim=12, text=text, width=16, layers=1, heads=2)))
