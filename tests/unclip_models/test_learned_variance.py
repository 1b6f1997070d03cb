"""The learned variance in half precision: a real network trains, and no network output makes the loss infinite."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from unclip_models.diffusion import GaussianDiffusion, discretized_log_likelihood
from unclip_models.settings import DiffusionConfig, UNetConfig
from unclip_models.unet import UNet

torch.set_num_threads(1)
SIDE, BATCH = 8, 2
LAST = 999


def _process(schedule: str = "cosine") -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionConfig(schedule=schedule, variance="learned_range"))  # type: ignore[arg-type]


def _unet(num_levels: int = 1) -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(model_channels=8, channel_mult=(1, 2)[:num_levels], num_res_blocks=1)
    return UNet(config, image_size=SIDE, out_channels=6)


def _images(num: int) -> Tensor:
    """Return smooth waves with flat patches at both ends of the range, where the 8-bit likelihood has its tails."""
    grid = torch.linspace(0, 2 * math.pi, SIDE)
    phase = torch.arange(num, dtype=torch.float32)[:, None, None, None]
    return (torch.sin(grid[:, None] + 2 * grid + phase + torch.arange(3.0)[:, None, None]) * 1.5).clamp(-1, 1)


class Training:
    """Plain training of the small U-Net, with every loss, gradient and weight checked."""

    def __init__(self, *, autocast: bool, num_levels: int) -> None:
        self.diffusion, self.images = _process(), _images(16)
        self.master = _unet(num_levels)
        # With bf16 weights the optimizer still steps float32 ones, as every mixed-precision engine does: an update of
        # less than 0.4% of a weight would otherwise be rounded away.
        self.network = self.master if autocast else copy.deepcopy(self.master).bfloat16()
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(self.master.parameters(), lr=3e-3, fused=True)
        self.rng = torch.Generator().manual_seed(1)

    def losses(self, x_start: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.diffusion.training_loss(self.network, x_start, t, noise)

    def step(self) -> tuple[float, float]:
        """Do one step; return its mse and vb."""
        x_start = self.images[torch.randint(0, len(self.images), (BATCH,), generator=self.rng)]
        t = torch.randint(0, LAST + 1, (BATCH,), generator=self.rng)
        loss, terms = self.losses(x_start, t, torch.randn(x_start.shape, generator=self.rng))
        assert loss.dtype == terms["vb"].dtype == torch.float32
        assert bool(loss.isfinite().all()), f"loss {loss.tolist()} at timesteps {t.tolist()}"
        self.network.zero_grad()
        loss.mean().backward()
        self._copy_gradients()
        norm = nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        assert bool(norm.isfinite()), f"gradient norm {float(norm)} at timesteps {t.tolist()}"
        self.optimizer.step()
        self._copy_weights()
        return float(terms["mse"].mean()), float(terms["vb"].mean())

    def _copy_gradients(self) -> None:
        if self.network is not self.master:
            for weight, master in zip(self.network.parameters(), self.master.parameters(), strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()

    @torch.no_grad()
    def _copy_weights(self) -> None:
        if self.network is not self.master:
            for weight, master in zip(self.network.parameters(), self.master.parameters(), strict=True):
                weight.copy_(master)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("autocast", "num_levels", "num_steps"), [(True, 1, 2000), (False, 2, 200)], ids=["autocast", "bf16_weights"]
)
def test_a_bf16_network_learns_its_variance(autocast: bool, num_levels: int, num_steps: int) -> None:
    training = Training(autocast=autocast, num_levels=num_levels)
    mse, vb = (torch.tensor(column) for column in zip(*(training.step() for _ in range(num_steps)), strict=True))
    window = num_steps // 5
    assert float(mse[-window:].mean()) < 0.5 * float(mse[:50].mean())
    assert float(vb[-window:].median()) < 0.5 * float(vb[:50].median())  # the rare t = 0 would dominate a mean
    assert all(bool(weight.isfinite().all()) for weight in training.master.parameters())
    at_the_ends = torch.tensor([0, LAST] * 8)
    noise = torch.randn(training.images.shape, generator=training.rng)
    _, terms = training.losses(training.images, at_the_ends, noise)
    assert bool(terms["vb"].isfinite().all())


def test_the_fresh_network_has_a_finite_bound_at_every_timestep() -> None:
    diffusion, network = _process(), _unet()
    x_start = _images(LAST + 1)
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, terms = diffusion.training_loss(network, x_start, torch.arange(LAST + 1), noise)
    assert bool(loss.isfinite().all()) and bool((terms["vb"][1:] >= 0).all())


def _extreme_loss(output: Tensor, t: int, schedule: str = "cosine") -> tuple[Tensor, Tensor]:
    """Return the loss of a batch at timestep t and the gradient of the network's output."""
    diffusion = _process(schedule)
    output = output.clone().requires_grad_()
    x_start = _images(len(output))
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0))
    loss, _ = diffusion.training_loss(lambda x, s: output, x_start, torch.full((len(output),), t), noise)
    loss.sum().backward()
    assert output.grad is not None
    return loss.detach(), output.grad


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("t", [0, 1, 2, 500, LAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_outputs_give_finite_losses_and_gradients(schedule: str, t: int, dtype: torch.dtype) -> None:
    largest = min(1e4, torch.finfo(dtype).max)
    for prediction in (0.0, largest, -largest):
        for variance in (0.0, largest, -largest):
            parts = [torch.full((2, 3, SIDE, SIDE), value, dtype=dtype) for value in (prediction, variance)]
            loss, gradient = _extreme_loss(torch.cat(parts, dim=1), t, schedule)
            assert loss.dtype == torch.float32 and bool(loss.isfinite().all())
            # In half precision a gradient may overflow where the loss itself is beyond its range; the sign is right.
            assert not bool(gradient.isnan().any())
            if dtype != torch.float16:
                assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("channel", [1e2, 1e4, -1e2, -1e4])
def test_the_gradient_of_an_extreme_variance_leads_back(channel: float) -> None:
    """At t = 1, where the two bounds are furthest apart; a clamp would leave no gradient at all."""
    parts = [torch.zeros(1, 3, SIDE, SIDE), torch.full((1, 3, SIDE, SIDE), channel)]
    _, gradient = _extreme_loss(torch.cat(parts, dim=1), 1)
    assert bool((gradient[:, 3:].sign() == math.copysign(1, channel)).all())


def test_variances_are_those_of_adm_wherever_a_network_may_come() -> None:
    """Slowed growth begins e^10 beyond the bounds: at 10 the channel still extrapolates exactly."""
    diffusion = _process()
    t = torch.tensor([0, 1, 500, LAST])
    x_t = torch.zeros(4, 1, 1, 1)
    lower, upper = diffusion.gather("posterior_log_variance", t, x_t), diffusion.gather("log_betas", t, x_t)
    for channel in (-8.0, -1.0, 0.3, 1.0, 8.0):
        output = torch.cat([x_t, torch.full_like(x_t, channel)], dim=1)
        fraction = (channel + 1) / 2
        got = diffusion.p_mean_variance(output, x_t, t).log_variance
        assert torch.allclose(got, fraction * upper + (1 - fraction) * lower, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_bound(dtype: torch.dtype) -> None:
    """Every term is the float32 number, whatever autocast would rather use for its operations."""
    diffusion = _process()
    rng = torch.Generator().manual_seed(0)
    output = torch.randn(4, 6, SIDE, SIDE, generator=rng).to(dtype)
    x_start, noise = _images(4), torch.randn(4, 3, SIDE, SIDE, generator=rng)
    t = torch.tensor([0, 1, 500, LAST])
    expected, expected_terms = diffusion.training_loss(lambda x, s: output.float(), x_start, t, noise)
    with torch.autocast("cpu", dtype):
        loss, terms = diffusion.training_loss(lambda x, s: output, x_start, t, noise)
    assert loss.dtype == terms["vb"].dtype == terms["mse"].dtype == torch.float32
    assert torch.equal(loss, expected) and torch.equal(terms["vb"], expected_terms["vb"])


def test_the_likelihood_keeps_its_digits_in_both_tails() -> None:
    """Float32 against float64, up to six deviations from the mean; the clamp at 1e-12 lies just beyond."""
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (-0.3, 0.3):
        log_scale = torch.tensor(math.log(0.15), dtype=torch.float64)
        exact = discretized_log_likelihood(x, torch.tensor(mean, dtype=torch.float64), log_scale)
        near = (x - mean).abs() < 6 * 0.15
        got = discretized_log_likelihood(x.float(), torch.tensor(mean), log_scale.float())
        assert torch.allclose(got[near].double(), exact[near], atol=2e-3)
    mirrored = discretized_log_likelihood(-x.float(), torch.tensor(-0.3), log_scale.float())
    assert torch.equal(mirrored, got)
