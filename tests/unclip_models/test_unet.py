"""The ADM U-Net: parameter counts of the paper's models, and the laws its blocks must keep."""

import math

import pytest
import torch

from unclip_models.settings import UNetConfig
from unclip_models.unet import AttentionBlock, GroupNorm, ResBlock, UNet, num_norm_groups

TINY = UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=8)


def millions(config: UNetConfig, **sizes: int) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config, **sizes).parameters()) / 1e6


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Give zero-initialised layers weights, so that a test sees every path."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


@pytest.mark.parametrize(
    ("scale_shift", "first", "second"), [(False, 691.6, 267.1), (True, 729.7, 282.1)], ids=["add", "scale_shift"]
)
def test_upsamplers_have_the_papers_size(scale_shift: bool, first: float, second: float) -> None:
    up1 = UNetConfig(model_channels=320, use_scale_shift_norm=scale_shift)
    up2 = UNetConfig(
        model_channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, use_scale_shift_norm=scale_shift
    )
    assert millions(up1, image_size=256, in_channels=6) == pytest.approx(first, abs=0.06)
    assert millions(up2, image_size=1024, in_channels=6) == pytest.approx(second, abs=0.06)


@pytest.mark.parametrize("size", [8, 16])
def test_shape_dtype_and_zero_output_at_start(size: int) -> None:
    net = UNet(TINY, image_size=8, out_channels=6, context_dim=12)
    x, t = torch.randn(2, 3, size, size), torch.tensor([0, 999])
    out = net(x, t, embedding=torch.randn(2, 64), context=torch.randn(2, 5, 12))
    assert out.shape == (2, 6, size, size) and out.dtype == torch.float32
    assert not out.any()  # the output convolution starts at zero


def test_bfloat16_weights_and_autocast_return_the_input_dtype() -> None:
    net = randomised(UNet(TINY, image_size=8, context_dim=12))
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    exact = net(x, t, context=context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(x, t, context=context)
    half = net.to(torch.bfloat16)(x, t, context=context)
    assert mixed.dtype == half.dtype == torch.float32
    assert (mixed - exact).abs().max() < 0.1 * exact.abs().max()
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_checkpointing_changes_neither_output_nor_gradient() -> None:
    plain = randomised(UNet(TINY, image_size=8, context_dim=12))
    config = UNetConfig(**{**TINY.__dict__, "checkpoint_activations": True})
    saving = UNet(config, image_size=8, context_dim=12)
    saving.load_state_dict(plain.state_dict())
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    grads = []
    for net in (plain, saving):
        net(x, t, context=context).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_resblock_without_resampling_starts_as_the_identity() -> None:
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(ResBlock(16, 16, TINY)(x, torch.randn(2, 64)), x)
    assert ResBlock(16, 16, TINY, resample="down")(x, torch.randn(2, 64)).shape == (2, 16, 2, 2)
    assert ResBlock(16, 24, TINY, resample="up")(x, torch.randn(2, 64)).shape == (2, 24, 8, 8)


def reference_attention(block: AttentionBlock, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """ADM's attention written out: rows per head in chunks q, k, v; context first; ch^-1/4 on q and on k."""
    batch, channels = x.shape[:2]
    dim = channels // block.num_heads
    pixels = block.norm(x).reshape(batch, channels, -1)  # (B, C, HW)
    qkv = torch.einsum("oc,bcl->bol", block.qkv.weight, pixels) + block.qkv.bias[:, None]
    q, k, v = qkv.reshape(batch * block.num_heads, 3 * dim, -1).split(dim, dim=1)
    kv = torch.einsum("oc,blc->bol", block.encoder_kv.weight, context) + block.encoder_kv.bias[:, None]
    ek, ev = kv.reshape(batch * block.num_heads, 2 * dim, -1).split(dim, dim=1)
    k, v = torch.cat([ek, k], dim=-1), torch.cat([ev, v], dim=-1)
    scale = 1 / math.sqrt(math.sqrt(dim))
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
    h = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, channels, -1)
    h = torch.einsum("oc,bcl->bol", block.proj_out.weight, h) + block.proj_out.bias[:, None]
    return (x.reshape(batch, channels, -1) + h).reshape(x.shape)


def test_attention_is_adms_in_row_order_and_context_first() -> None:
    block = randomised(AttentionBlock(32, UNetConfig(model_channels=32, head_channels=8), context_dim=12))
    assert block.num_heads == 4
    x, context = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 12)
    torch.testing.assert_close(block(x, context), reference_attention(block, x, context))


def test_a_masked_token_is_as_good_as_absent() -> None:
    net = randomised(UNet(TINY, image_size=8, context_dim=12))
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    masked = net(x, t, context=context, context_mask=mask)
    torch.testing.assert_close(masked, net(x, t, context=context[:, :3]))
    assert not torch.allclose(masked, net(x, t, context=context))


def test_channels_last_gives_the_same() -> None:
    net = randomised(UNet(TINY, image_size=8))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = net(x, t)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), t), expected, atol=1e-5, rtol=1e-4)


def test_without_attention_the_network_is_local_and_size_free() -> None:
    config = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
    net = randomised(UNet(config, image_size=32, in_channels=6))
    assert not [module for module in net.modules() if isinstance(module, AttentionBlock)]
    assert net(torch.randn(1, 6, 8, 24), torch.tensor([5])).shape == (1, 3, 8, 24)


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_both_ways_of_resampling(resblock_updown: bool) -> None:
    config = UNetConfig(model_channels=8, channel_mult=(1, 2, 2), num_res_blocks=2, resblock_updown=resblock_updown)
    assert UNet(config, image_size=16)(torch.randn(1, 3, 16, 16), torch.tensor([5])).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("channels", [2, 8, 16, 24, 48, 64, 96, 128, 192, 320, 640, 960, 1536, 2048])
def test_norm_groups_divide_and_are_adms_from_128_channels_on(channels: int) -> None:
    groups = num_norm_groups(channels)
    assert channels % groups == 0
    assert channels // groups >= 4 or groups == 1
    if channels >= 128 and channels % 32 == 0:
        assert groups == 32


def test_group_norm_computes_in_float32() -> None:
    norm = GroupNorm(2, 8)
    x = (torch.randn(2, 8, 4, 4) + 10).to(torch.bfloat16)
    groups = x.double().reshape(2, 2, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    exact = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape).to(torch.bfloat16)
    for module in (norm, norm.to(torch.bfloat16)):
        out = module(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, exact, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_channels": 15}, "model_channels"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_resolutions": (5,)}, r"attention_resolutions.*\[8, 4\]"),
        ({"head_channels": 5}, "head_channels"),
        ({"channel_mult": (1, 1, 1, 1, 1)}, "image_size: 8 px"),
    ],
)
def test_bad_settings_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        UNet(UNetConfig(**{**TINY.__dict__, **change}), image_size=8)


def test_bad_inputs_are_refused() -> None:
    net = UNet(TINY, image_size=8)
    with pytest.raises(ValueError, match="multiples of 2"):
        net(torch.randn(1, 3, 7, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match="context_dim=None"):
        net(torch.randn(1, 3, 8, 8), torch.tensor([0]), context=torch.randn(1, 2, 4))
