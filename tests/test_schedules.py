import math

import pytest
import torch

from ldm.diffusion.schedules import (
    Cosine,
    Explicit,
    Exponential,
    Karras,
    Leading,
    Linear,
    LogNormal,
    Mode,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    Shifted,
    Spacing,
    Trailing,
    ZeroTerminalSNR,
    grid,
    linspace,
)  # fmt: skip
from ldm.errors import UserError

AYS = Explicit([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152])
ALL = [ScaledLinear(), Linear(), ZeroTerminalSNR(ScaledLinear()), Karras(), Exponential(), LogNormal(), RectifiedFlow(),
       Shifted(RectifiedFlow(), 3.0), Mode(), Mode(scale=-0.8), Cosine(), AYS]  # fmt: skip


@pytest.mark.parametrize("schedule", ALL, ids=lambda each: type(each).__name__)
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
        (Shifted(RectifiedFlow(), 3.0), 0.003 / 0.999, 2997.0),
        (ZeroTerminalSNR(ScaledLinear()), 0.02917, 4096.0),
        (Exponential(), 0.002, 80.0),
        (AYS, 0.152, 14.615),
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


@pytest.mark.parametrize("schedule", ALL, ids=lambda each: type(each).__name__)
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
        (lambda: Shifted(RectifiedFlow(), 0), "shift > 0"),
        (lambda: Mode(scale=2.0), r"scale in \[-1, 1.752\]"),
        (lambda: ZeroTerminalSNR(ScaledLinear(), 10.0), "above the schedule's own, 14.6146"),
        (lambda: Exponential(1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: Explicit([1.0]), "at least 2 falling"),
        (lambda: Explicit([1.0, 2.0]), "at least 2 falling"),
        (lambda: Explicit([1.0, 0.0]), "the last above 0"),
        (lambda: grid(Karras(), 1001, Trailing()), "1001 steps; give at most 1000"),
        (lambda: grid(Karras(), 1000, Leading()), "1000 steps need index 1000; give fewer steps, or offset=0"),
        (lambda: RectifiedFlow(t_max=1.0), "t_max < 1"),
        (lambda: Cosine(5, -5), "logsnr_min < logsnr_max"),
    ],
)
def test_bad_settings(make, message: str):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("ours", "name"), [(ScaledLinear(), "scaled_linear"), (Linear(0.00085, 0.012), "linear")])
@pytest.mark.parametrize("steps", [2, 7, 20, 50])  # one linspace step of theirs starts without noise
@pytest.mark.parametrize(
    ("spacing", "theirs"),
    [(linspace, "linspace"), (Leading(), "leading"), (Trailing(), "trailing")],
    ids=["linspace", "leading", "trailing"],
)
def test_spacings_are_those_of_diffusers(ours: Schedule, name: str, steps: int, spacing: Spacing, theirs: str):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDIMScheduler(1000, 0.00085, 0.012, name, steps_offset=1, timestep_spacing=theirs)
    peer.set_timesteps(steps)
    index = ours.index(grid(ours, steps, spacing)[:-1].double())
    tolerance = 0.51 if theirs == "linspace" else 0.01  # they round to whole steps
    torch.testing.assert_close(index, peer.timesteps.double(), rtol=0, atol=tolerance)


def test_zero_terminal_snr_is_that_of_diffusers():
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - scheduling.rescale_zero_terminal_snr(betas)).cumprod(0)
    sigma = ZeroTerminalSNR(ScaledLinear())(torch.arange(1000).double() / 999)
    torch.testing.assert_close(1 / (1 + sigma**2), expected, rtol=1e-6, atol=1e-7)


def test_zero_terminal_snr_keeps_its_index():
    schedule, index = ZeroTerminalSNR(ScaledLinear()), torch.arange(1000).double()
    torch.testing.assert_close(schedule.index(schedule(index / 999)), index, rtol=0, atol=1e-3)


def test_mode_is_equation_20():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    tau = 1 - u - 1.29 * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
    sigma = Mode(1e-6, 1 - 1e-6)(1 - u)
    torch.testing.assert_close(sigma / (1 + sigma), tau, rtol=0, atol=1e-5)
    torch.testing.assert_close(Mode(scale=0.0)(u), RectifiedFlow()(u))


def test_cosmap_is_the_cosine_schedule():
    """t = 1 − 1/(tan(π/2·u) + 1) (Esser et al. 2024, section 3.1), σ = t/(1 − t)."""
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    t = 1 - 1 / ((math.pi / 2 * u).tan() + 1)
    torch.testing.assert_close(Cosine(-40, 40)(u), t / (1 - t), rtol=1e-5, atol=0)


def test_shift_is_sd3s_of_flow_time():
    """Equation 23: t' = shift·t/(1 + (shift − 1)·t)."""
    sigma = Shifted(RectifiedFlow(), 3.0)(torch.tensor([0.2, 0.5, 0.9]))
    t = RectifiedFlow()(torch.tensor([0.2, 0.5, 0.9]))
    t = t / (1 + t)
    torch.testing.assert_close(sigma / (1 + sigma), 3 * t / (1 + 2 * t))


def test_explicit_levels_are_used_as_they_are_and_log_linear_between():
    levels = list(AYS.sigmas)
    torch.testing.assert_close(grid(AYS, 10)[:-1], torch.tensor(levels))
    twice = grid(AYS, 19)
    torch.testing.assert_close(twice[:-1:2], torch.tensor(levels))
    assert twice[1].item() == pytest.approx(math.sqrt(14.615 * 6.475), rel=1e-4)


def test_exponential_is_geometric():
    sigmas = grid(Exponential(0.01, 10.0), 4)
    torch.testing.assert_close(sigmas, torch.tensor([10.0, 1.0, 0.1, 0.01, 0.0]))
