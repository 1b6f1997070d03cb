"""Memory format and compilation change no result, and networks can be compiled whole."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.unclip_models.small_stack import randomised
from unclip_models.efficiency import make_efficient
from unclip_models.settings import UNetConfig
from unclip_models.transformer import Transformer
from unclip_models.unet import UNet

torch.set_num_threads(1)
CONFIG = UNetConfig(
    model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), head_channels=16
)


def _unet() -> UNet:
    torch.manual_seed(0)
    unet = randomised(UNet(CONFIG, image_size=16, context_dim=6))
    assert isinstance(unet, UNet)
    return unet


INPUTS: dict[str, Tensor] = {
    "x": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    "t": torch.tensor([3, 700]),
    "context": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2)),
}


def test_channels_last_reaches_the_activations_and_changes_no_result() -> None:
    unet = _unet()
    other = make_efficient(copy.deepcopy(unet), channels_last=True)
    formats: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        formats.append(output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous())

    other.input_blocks[1][0].register_forward_hook(look)
    torch.testing.assert_close(other(**INPUTS), unet(**INPUTS), atol=1e-5, rtol=1e-4)
    assert formats == [True]


@pytest.mark.parametrize("network", ["unet", "dropout", "causal", "padded"])
def test_networks_are_captured_whole(network: str) -> None:
    """A graph break would leave half of what compilation can do; the eager backend shows it without a C++ compiler."""
    torch._dynamo.reset()
    model: nn.Module = _unet()
    inputs = INPUTS
    if network == "dropout":
        model = UNet(dataclasses.replace(CONFIG, dropout=0.3), image_size=16, context_dim=6)
        inputs = INPUTS | {"dropout_seeds": torch.tensor([3, 4])}
    elif network != "unet":
        model = Transformer(16, 2, 2, causal=network == "causal")
        inputs = {"x": torch.randn(2, 5, 16)}
        if network == "padded":
            inputs["visible"] = torch.tensor([[True] * 3 + [False] * 2] * 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), model(**inputs))


def test_compiling_keeps_the_names_of_weights() -> None:
    unet = _unet()
    names = list(unet.state_dict())
    assert list(make_efficient(unet, compile=True).state_dict()) == names
