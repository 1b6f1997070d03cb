"""Choices that change how fast a network runs and not what it computes.

Attention is PyTorch's fused kernel everywhere, and activation checkpointing is a setting of each model. Here are the
two choices that depend on the machine: compilation, and the memory format of convolutions. Measured on CPUs, neither
format wins by much; on GPUs with tensor cores convolutions in half precision want channels last. There the one takes
the other: what is not compiled goes back to NCHW at every group norm (pytorch/pytorch#111824).
"""

from torch import nn

from unclip_models.transformer import Transformer
from unclip_models.unet import UNet


def make_efficient(model: nn.Module, *, compile: bool = False, channels_last: bool = False) -> nn.Module:
    """Apply the choices to every U-Net and transformer in a model, in place; names of weights stay as they are.

    Args:
        model: any model of this package; a CLIP is left alone.
        compile: compile each network at its first call, for the shapes it then meets.
        channels_last: keep the activations of U-Nets in NHWC order.

    Returns:
        The model.
    """
    for network in model.modules():
        if not isinstance(network, UNet | Transformer):
            continue
        if channels_last and isinstance(network, UNet):
            network.channels_last = True
        if compile:
            network.compile()
    return model
