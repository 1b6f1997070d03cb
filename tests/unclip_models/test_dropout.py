"""Dropout by sample: the same whatever the batch, and independent from layer to layer."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unclip_models.golden_curves import BATCH, CONFIGS, images_for, make, make_batch
from unclip_models.checkpoint import build
from unclip_models.dropout import SampleDropout, dropout_seeds, number_dropouts
from unclip_models.randomness import SampleRandom
from unclip_models.unet import UNet


def gradients(model: nn.Module, batch: dict[str, Tensor], rows: list[list[int]]) -> dict[str, Tensor]:
    """Return the gradients of the loss over all samples, computed in the given parts."""
    model.zero_grad()
    for part in rows:
        taken = {name: values[part] for name, values in batch.items()}
        loss, _ = model.loss(taken, SampleRandom(3, 5, [100 + row for row in part]))  # type: ignore[operator]
        (loss * len(part) / BATCH).backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def warmed_up(model: nn.Module) -> nn.Module:
    """Move the weights away from zero, which would hide what happens before them."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.05 * torch.randn(param.shape, generator=rng)
    return model


@pytest.mark.parametrize("name", ["decoder", "upsampler_blur"])
def test_parts_and_order_of_a_batch_do_not_matter(name: str) -> None:
    model, batch = warmed_up(make(name)), make_batch() | images_for(CONFIGS[name])
    assert model.config.unet.dropout > 0  # type: ignore[union-attr]
    whole = gradients(model, batch, [list(range(BATCH))])
    for rows in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[7], [1, 0], [6, 2, 5, 3, 4]]):
        torch.manual_seed(len(rows))
        parts = gradients(model, batch, rows)
        for param in whole:
            torch.testing.assert_close(parts[param], whole[param], atol=1e-5, rtol=1e-3)
    model.eval()
    other = gradients(model, batch, [list(range(BATCH))])
    assert any(not torch.allclose(other[param], whole[param], rtol=1e-2) for param in whole), "it does drop"


def test_what_is_computed_once_more_is_the_same() -> None:
    config = CONFIGS["decoder"]
    model, batch = warmed_up(make("decoder")), make_batch() | images_for(config)
    again = build(dataclasses.replace(config, unet=dataclasses.replace(config.unet, checkpoint_activations=True)))
    again.load_state_dict(model.state_dict())
    rows = [list(range(BATCH))]
    wanted, found = gradients(model, batch, rows), gradients(again.train(), batch, rows)
    assert all(torch.equal(found[param], wanted[param]) for param in wanted)


def test_numbers_are_dropped_and_the_others_scaled() -> None:
    layer = SampleDropout(0.25)
    x = torch.ones(50, 40, 10, dtype=torch.bfloat16)
    out = layer(x, dropout_seeds(SampleRandom(0, 0, range(50))))
    assert out.dtype == x.dtype and set(out.unique().tolist()) == {0.0, float(torch.tensor(4 / 3, dtype=x.dtype))}
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.01
    assert layer.eval()(x, None) is x and SampleDropout(0.0)(x, None) is x


def test_masks_are_independent_coins() -> None:
    layers = [SampleDropout(0.1), SampleDropout(0.1)]
    number_dropouts(nn.Sequential(*layers))
    x = torch.ones(100, 600)
    seeds = [dropout_seeds(SampleRandom(0, step, range(100))) for step in (4, 5)]
    masks = [layer(x, of_step) > 0 for layer in layers for of_step in seeds]
    for mask in masks:
        flat = mask.float() - 0.9
        assert float((flat[1:] * flat[:-1]).mean().abs()) < 0.01, "neighbours"
        assert len({tuple(row.tolist()) for row in mask}) == 100
    for one, other in itertools.combinations(masks, 2):
        assert float(((one.float() - 0.9) * (other.float() - 0.9)).mean().abs()) < 0.01, "steps and layers"


def test_layers_have_masks_of_their_own() -> None:
    (unet,) = (module for module in make("decoder").modules() if isinstance(module, UNet))
    numbers = [module.layer for module in unet.modules() if isinstance(module, SampleDropout)]
    assert len(numbers) == len(set(numbers)) > 3


def test_without_seeds_it_says_so() -> None:
    (unet,) = (module for module in make("decoder").modules() if isinstance(module, UNet))
    with pytest.raises(ValueError, match=r"in training mode it needs dropout_seeds\(random\); pass them, or call eval"):
        unet(torch.zeros(1, 3, 8, 8), torch.zeros(1), context=torch.zeros(1, 2, unet.context_dim))


class Asked(SampleRandom):
    """Remembers what it was asked for."""

    def generator(self, tag: str) -> list[np.random.Generator]:
        self.__dict__.setdefault("tags", []).append(tag)
        return super().generator(tag)


@pytest.mark.parametrize("name", ["decoder", "upsampler_blur"])
@pytest.mark.parametrize(("dropout", "training"), [(0.1, True), (0.1, False), (0.0, True)])
def test_seeds_are_drawn_only_where_something_is_dropped(name: str, dropout: float, training: bool) -> None:
    config = CONFIGS[name]
    model = build(dataclasses.replace(config, unet=dataclasses.replace(config.unet, dropout=dropout)))
    random = Asked(3, 5, range(BATCH))
    model.train(training).loss(make_batch() | images_for(config), random)  # type: ignore[operator]
    tags = vars(random)["tags"]
    assert ("dropout" in tags) == (training and dropout > 0) and "noise" in tags
