import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion.schedules import Karras, ScaledLinear, grid
from ldm.diffusion.solvers import Solver, dpmpp_2m, euler, heun
from ldm.errors import UserError

ALL = [euler, heun, dpmpp_2m]
MEAN, STD = 0.7, 0.5


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of data ~ N(MEAN, STD²)."""
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    return (s2 * MEAN + STD**2 * x) / (STD**2 + s2)


def gaussian_flow(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact solution of its probability-flow ODE."""
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + sigma_next**2) / (STD**2 + sigma**2))


def start(sigma: float, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return MEAN + math.sqrt(STD**2 + sigma**2) * torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype)


def order(solver: Solver, steps: list[int], schedule: Karras) -> float:
    """Slope of log error over log steps, in float64, from sigma_max down to sigma_min."""
    x, errors = start(schedule.sigma_max), []
    for n in steps:
        sigmas = schedule(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        exact = gaussian_flow(x, schedule.sigma_max, schedule.sigma_min)
        errors.append((solver(gaussian, x, sigmas) - exact).square().mean().sqrt().log())
    log_steps = torch.tensor(steps, dtype=torch.float64).log()
    slope = torch.linalg.lstsq(torch.stack([log_steps, torch.ones_like(log_steps)], 1), torch.stack(errors)[:, None])
    return -slope.solution[0].item()


# rho = 1000 is a geometric grid to within a percent
@pytest.mark.parametrize("schedule", [Karras(), Karras(0.02, 20.0, 1000.0)], ids=["karras", "geometric"])
@pytest.mark.parametrize(("solver", "expected"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence(solver: Solver, expected: int, schedule: Karras):
    assert order(solver, [64, 128, 256, 512], schedule) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(("solver", "tolerance"), [(euler, 0.1), (heun, 5e-3), (dpmpp_2m, 5e-3)])
def test_reaches_the_data_distribution_at_zero(solver: Solver, tolerance: float):
    x = start(80.0, torch.float32)
    x0 = solver(gaussian, x, grid(Karras(), 100))
    torch.testing.assert_close(x0, gaussian_flow(x, 80.0, 0.0), rtol=0, atol=tolerance)


def test_heun_is_algorithm_1():
    """As printed, slope by slope."""
    x, sigmas = start(80.0), grid(Karras(), 18).double()
    expected = x
    for sigma, sigma_next in pairwise(sigmas):
        d = (expected - gaussian(expected, sigma)) / sigma
        ahead = expected + (sigma_next - sigma) * d
        if sigma_next > 0:
            d_ahead = (ahead - gaussian(ahead, sigma_next)) / sigma_next
            ahead = expected + (sigma_next - sigma) * (d / 2 + d_ahead / 2)
        expected = ahead
    torch.testing.assert_close(heun(gaussian, x, sigmas), expected, rtol=0, atol=1e-10)


def test_dpmpp_2m_is_algorithm_2():
    """In the paper's terms: λ = −log σ, r = h_before/h, D = (1 + 1/(2r))·x0 − 1/(2r)·x0_before (α = 1 here)."""
    x, sigmas = start(80.0), Karras()(torch.linspace(1, 0, 19, dtype=torch.float64))
    lambdas, estimates, expected = -sigmas.log(), [], x
    for i in range(18):
        estimates.append(gaussian(expected, sigmas[i]))
        h, d = lambdas[i + 1] - lambdas[i], estimates[-1]
        if i > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * estimates[-2]
        expected = sigmas[i + 1] / sigmas[i] * expected - torch.expm1(-h) * d
    torch.testing.assert_close(dpmpp_2m(gaussian, x, sigmas), expected, rtol=0, atol=1e-10)


def test_euler_is_ddim():
    """DDIM with η = 0 in its own coordinates: x_t = √ᾱ·x0 + √(1−ᾱ)·ε, a nonlinear ε network, 20 steps."""
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))

    def eps(x_t: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("dc,bchw->bdhw", mix, x_t))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        return x - sigma * eps(x / (1 + sigma**2).sqrt())

    sigmas = grid(ScaledLinear(), 20)
    alphas_cumprod = 1 / (1 + sigmas**2)
    x = start(sigmas[0].item(), torch.float32)
    x_t = x * alphas_cumprod[0].sqrt()
    for a, a_next in pairwise(alphas_cumprod):
        e = eps(x_t)
        x0_hat = (x_t - (1 - a).sqrt() * e) / a.sqrt()
        x_t = a_next.sqrt() * x0_hat + (1 - a_next).sqrt() * e
    torch.testing.assert_close(euler(denoise, x, sigmas), x_t, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ALL)
def test_a_constant_denoiser_is_reached_exactly_from_a_huge_sigma(solver: Solver):
    x0 = torch.randn(2, 3, 4, 4)
    x = x0 + 1e4 * torch.randn(2, 3, 4, 4)
    assert torch.equal(solver(lambda x, sigma: x0, x, torch.tensor([1e4, 100.0, 1.0, 0.0])), x0)
    at_one = solver(lambda x, sigma: x0, x, torch.tensor([1e4, 100.0, 1.0]))
    torch.testing.assert_close(at_one, x0 + (x - x0) / 1e4, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("solver", "evaluations"), [(euler, 5), (heun, 9), (dpmpp_2m, 5)])
def test_evaluations_callback_and_inputs(solver: Solver, evaluations: int):
    x, sigmas, calls, progress = start(80.0), grid(Karras(), 5), [], []
    before = x.clone()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (2,)
        assert sigma.dtype == x.dtype
        calls.append(sigma[0].item())
        return gaussian(x, sigma)

    solver(denoise, x, sigmas, callback=lambda i, x0_hat: progress.append((i, x0_hat.shape)))
    assert len(calls) == evaluations
    assert min(calls) > 0
    assert progress == [(i, x.shape) for i in range(5)]
    assert torch.equal(x, before)


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([[1.0, 0.0]], r"shape \(1, 2\)"),
        ([1.0], r"shape \(1,\); .* at least 2"),
        ([math.inf, 1.0, 0.0], "not finite"),
        ([1.0, math.nan, 0.0], "not finite"),
        ([1.0, 1.0, 0.0], r"sigmas\[0\] = 1 is followed by 1; .* strictly falling"),
        ([2.0, 0.5, 1.0], r"sigmas\[1\] = 0.5 is followed by 1"),
        ([1.0, 0.0, -1.0], "ends at -1"),
    ],
)
def test_bad_sigmas(solver: Solver, sigmas: list, message: str):
    with pytest.raises(UserError, match=message):
        solver(gaussian, torch.zeros(1, 1, 2, 2), torch.tensor(sigmas))


@pytest.mark.parametrize("solver", ALL)
def test_bad_x(solver: Solver):
    with pytest.raises(UserError, match="x holds a value that is not finite"):
        solver(gaussian, torch.full((1, 1, 2, 2), math.nan), torch.tensor([1.0, 0.0]))
