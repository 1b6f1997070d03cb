"""Scaling of embeddings: the three kinds, their inverse, and what is refused."""

import pytest
import torch

from unclip_models.embedding_scaling import EmbeddingScaler, scale_factor
from unclip_models.settings import SCALINGS


def test_the_papers_factor_keeps_its_standard_deviation_in_other_dimensions() -> None:
    assert scale_factor("paper", 1024) == pytest.approx(17.2)
    assert scale_factor("paper", 768) == pytest.approx(14.9, abs=0.01)
    assert scale_factor("sqrt_dim", 768) == pytest.approx(27.71, abs=0.01)
    with pytest.raises(ValueError, match="no single factor"):
        scale_factor("mean_std", 768)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_unscaling_undoes_scaling(scaling: str) -> None:
    scaler = EmbeddingScaler(scaling, 8)  # type: ignore[arg-type]
    if scaling == "mean_std":
        scaler.set_statistics(torch.linspace(-1, 1, 8), torch.linspace(0.1, 2, 8))
    z = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(scaler.unscale(scaler.scale(z)), z)


def test_measured_statistics_give_zero_mean_and_unit_spread() -> None:
    z = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3
    scaler = EmbeddingScaler("mean_std", 6)
    scaler.set_statistics(z.mean(0), z.std(0, correction=0))
    scaled = scaler.scale(z)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(6))


def test_an_own_factor_replaces_the_default_and_half_precision_keeps_it() -> None:
    scaler = EmbeddingScaler("paper", 4, 3.0)
    torch.testing.assert_close(scaler.bfloat16().scale(torch.ones(1, 4)), torch.full((1, 4), 3.0))
    assert scaler.std.dtype == torch.float32


def test_statistics_are_required_and_checked() -> None:
    scaler = EmbeddingScaler("mean_std", 3)
    with pytest.raises(ValueError, match="call set_statistics first"):
        scaler.scale(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"std must be finite and \(3,\), not \(2,\)"):
        scaler.set_statistics(torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match="no spread"):
        scaler.set_statistics(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    loaded = EmbeddingScaler("mean_std", 3)
    loaded.load_state_dict({"mean": torch.zeros(3), "std": torch.ones(3)})
    assert torch.equal(loaded.scale(torch.ones(1, 3)), torch.ones(1, 3))
