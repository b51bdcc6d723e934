import math

import pytest
import torch

from ldm.diffusion.schedules import Cosine, Karras, LogNormal, RectifiedFlow, ScaledLinear, Schedule, grid
from ldm.errors import UserError

ALL = [ScaledLinear(), Karras(), LogNormal(), RectifiedFlow(), RectifiedFlow(shift=3.0), Cosine()]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_rises_and_stays_finite(schedule: Schedule):
    sigma = schedule(torch.linspace(0, 1, 1001).view(7, 143))
    assert sigma.shape == (7, 143)
    assert sigma.dtype == torch.float64
    assert sigma.isfinite().all()
    assert (sigma > 0).all()
    assert (sigma.flatten().diff() > 0).all()


@pytest.mark.parametrize(
    ("schedule", "sigma_min", "sigma_max"),
    [
        (ScaledLinear(), 0.02917, 14.6146),
        (Karras(), 0.002, 80.0),
        (RectifiedFlow(), 0.001 / 0.999, 999.0),
        (RectifiedFlow(shift=3.0), 0.003 / 0.999, 2997.0),
        (Cosine(), math.exp(-7.5), math.exp(7.5)),
    ],
    ids=str,
)
def test_ends(schedule: Schedule, sigma_min: float, sigma_max: float):
    ends = schedule(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([sigma_min, sigma_max]).double(), rtol=1e-4, atol=0)


def test_scaled_linear_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sigma = ScaledLinear()(torch.arange(1000).double() / 999)
    torch.testing.assert_close(1 / (1 + sigma**2), peer.alphas_cumprod.double(), rtol=2e-5, atol=0)
    assert sigma[-1].item() == pytest.approx(14.6146, abs=1e-3)
    assert sigma[0].item() == pytest.approx(0.0292, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_index_inverts_scaled_linear(dtype: torch.dtype):
    schedule, index = ScaledLinear(), torch.linspace(0, 999, 4001, dtype=torch.float64)
    found = schedule.index(schedule(index / 999).to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), index, rtol=0, atol=1e-3)
    assert schedule.index(torch.tensor([1e-4, 1e4])).tolist() == [0, 999]


def test_scaled_linear_table_made_under_inference_mode_serves_training():
    schedule = ScaledLinear(beta_end=0.013)  # not in the cache yet
    with torch.inference_mode():
        schedule(torch.tensor([0.5]))
    sigma = torch.tensor([1.0], requires_grad=True)
    schedule.index(sigma).sum().backward()
    assert sigma.grad.isfinite().all()


def test_karras_is_equation_5():
    sigmas, n, rho = Karras()(torch.linspace(1, 0, 18)), 18, 7
    for i in range(n):
        expected = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
        assert sigmas[i].item() == pytest.approx(expected, rel=1e-5)


def test_lognormal_quantiles():
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1]
    log_sigma = LogNormal(-1.2, 1.2)(u).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=1e-3)


def test_shifted_logit_normal_flow_time_is_lognormal():
    """SD3: t = sigmoid(N(0, 1)), then shift·t/(1 + (shift−1)·t); σ = t/(1−t)."""
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    t = torch.special.ndtri(u).sigmoid()
    t = 3 * t / (1 + 2 * t)
    torch.testing.assert_close(LogNormal(math.log(3), 1)(u), t / (1 - t))


def test_rectified_flow_is_linear_in_flow_time():
    sigma = RectifiedFlow()(torch.linspace(0, 1, 11, dtype=torch.float64))
    torch.testing.assert_close(sigma / (1 + sigma), torch.linspace(0.001, 0.999, 11, dtype=torch.float64))


def test_cosine_is_near_that_of_nichol_and_dhariwal():
    t = torch.linspace(0.1, 0.9, 81, dtype=torch.float64)
    s = 0.008
    alphas_cumprod = ((t + s) / (1 + s) * math.pi / 2).cos() ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
    sigma = Cosine()(t)
    torch.testing.assert_close(1 / (1 + sigma**2), alphas_cumprod, rtol=0, atol=0.02)


@pytest.mark.parametrize("schedule", ALL, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_grid_falls_from_the_top_to_zero(schedule: Schedule, steps: int):
    sigmas = grid(schedule, steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    ends = schedule(torch.tensor([1.0, 0.0])).float()
    assert sigmas[0] == ends[0]
    assert steps == 1 or sigmas[-2] == ends[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid(Karras(), 0), "steps is 0; .* at least 1"),
        (lambda: ScaledLinear(beta_start=0.02), "0 < beta_start < beta_end < 1"),
        (lambda: ScaledLinear(timesteps=1), "timesteps >= 2"),
        (lambda: Karras(sigma_min=0), "0 < sigma_min < sigma_max"),
        (lambda: Karras(rho=0), "rho > 0"),
        (lambda: LogNormal(std=0), "std > 0"),
        (lambda: LogNormal(mean=math.nan), "finite mean"),
        (lambda: RectifiedFlow(shift=0), "shift > 0"),
        (lambda: RectifiedFlow(t_max=1.0), "t_max < 1"),
        (lambda: Cosine(5, -5), "logsnr_min < logsnr_max"),
    ],
)
def test_bad_settings(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
