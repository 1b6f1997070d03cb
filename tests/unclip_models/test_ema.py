"""Averages in closed form, on whole models and on shards."""

import pytest
import torch
from torch import nn

from unclip_models.ema import EMA, ema_update, warmed_up_decay


def test_constant_weights_are_approached_geometrically() -> None:
    ema = [torch.zeros(3), torch.zeros(2, 2)]
    params = [torch.ones(3), torch.full((2, 2), -2.0)]
    for _ in range(5):
        ema_update(ema, params, 0.9)
    torch.testing.assert_close(ema[0], torch.full((3,), 1 - 0.9**5))
    torch.testing.assert_close(ema[1], torch.full((2, 2), -2 * (1 - 0.9**5)))


def test_the_ends_of_the_decay_copy_and_keep() -> None:
    ema = [torch.zeros(2)]
    ema_update(ema, [torch.ones(2)], 1.0)
    assert torch.equal(ema[0], torch.zeros(2))
    ema_update(ema, [torch.ones(2)], 0.0)
    assert torch.equal(ema[0], torch.ones(2))


def test_shards_average_to_the_whole() -> None:
    whole, params = torch.randn(10), torch.randn(10)
    shards = [whole[:4].clone(), whole[4:].clone()]
    ema_update([whole], [params], 0.7)
    for shard, part in zip(shards, (params[:4], params[4:]), strict=True):
        ema_update([shard], [part], 0.7)
    assert torch.equal(torch.cat(shards), whole)


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    param = torch.full((4,), 1.0, dtype=torch.bfloat16)
    average = EMA([torch.zeros(4, dtype=torch.bfloat16)], 0.999, warm_up=False)
    average.update([param])
    torch.testing.assert_close(average.shadow["0"], torch.full((4,), 0.001))


def test_warm_up_rises_to_the_decay() -> None:
    decays = [warmed_up_decay(0.99, n) for n in range(2000)]
    assert decays[0] == 0.1 and decays[-1] == 0.99 and decays == sorted(decays)


def test_model_average_is_independent_resumes_and_is_written_back() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    average = EMA(model, 0.5, warm_up=False)
    with torch.no_grad():
        model.weight.add_(1.0)
    torch.testing.assert_close(average.shadow["weight"], before)
    average.update(model)
    torch.testing.assert_close(average.shadow["weight"], before + 0.5)

    resumed = EMA(model, 0.5, warm_up=False)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in average.state_dict().items()})
    assert resumed.num_updates == 1
    resumed.copy_to(model)
    torch.testing.assert_close(model.weight.detach(), before + 0.5)


def test_mismatches_are_refused() -> None:
    with pytest.raises(ValueError, match="pair up"):
        ema_update([torch.zeros(1)], [], 0.5)
    with pytest.raises(ValueError, match="tensor 0 is"):
        ema_update([torch.zeros(1)], [torch.zeros(2)], 0.5)
    with pytest.raises(ValueError, match="decay"):
        ema_update([torch.zeros(1)], [torch.zeros(1)], 1.5)
    average = EMA(nn.Linear(3, 2), 0.5)
    with pytest.raises(ValueError, match="missing"):
        average.update(nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match="needed"):
        average.load_state_dict(EMA(nn.Linear(4, 2), 0.5).state_dict())
