import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.noise import BrownianPath
from ldm.diffusion.schedules import Karras, ScaledLinear, grid
from ldm.diffusion.solvers import (
    Solver,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_sde,
    euler,
    heun,
    lcm,
    lms,
    plms,
    restart,
    unipc,
)  # fmt: skip
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom

UNIPC_3 = partial(unipc, order=3)
# UniPC-p is of order p + 1: the corrector adds one (Zhao et al. 2023, theorem 3.1)
ORDERS = {euler: 1, heun: 2, dpmpp_2s: 2, dpmpp_2m: 2, unipc: 3, dpmpp_3m: 3, UNIPC_3: 4}
STOCHASTIC = {
    "ddpm": partial(euler, eta=1.0),
    "ddim half": partial(euler, eta=0.5),
    "2s ancestral": partial(dpmpp_2s, eta=1.0),
    "sde": dpmpp_sde,
    "2m sde": partial(dpmpp_2m, eta=1.0),
    "3m sde": partial(dpmpp_3m, eta=1.0),
    "churn": partial(heun, churn=40.0, churn_min=0.05, churn_max=50.0),
    "lcm": lcm,
    "restart": restart,
}
ALL = [*ORDERS, lms, plms, *STOCHASTIC.values()]
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


@pytest.mark.parametrize(("solver", "expected"), ORDERS.items())
def test_order_of_convergence(solver: Solver, expected: int):
    assert order(solver, [64, 128, 256, 512], Karras()) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(("solver", "expected"), [(s, n) for s, n in ORDERS.items() if n < 3])
def test_order_of_convergence_on_a_geometric_grid(solver: Solver, expected: int):
    schedule = Karras(0.02, 20.0, 1000.0)  # rho = 1000 is geometric to within a percent
    assert order(solver, [64, 128, 256, 512], schedule) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(("solver", "tolerance"), [(euler, 0.1), *((s, 5e-3) for s in [*list(ORDERS)[1:], lms])])
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


@pytest.mark.parametrize("solver", ORDERS)
def test_a_constant_denoiser_is_reached_exactly_from_a_huge_sigma(solver: Solver):
    x0 = torch.randn(2, 3, 4, 4)
    x = x0 + 1e4 * torch.randn(2, 3, 4, 4)
    assert torch.equal(solver(lambda x, sigma: x0, x, torch.tensor([1e4, 100.0, 1.0, 0.0])), x0)
    at_one = solver(lambda x, sigma: x0, x, torch.tensor([1e4, 100.0, 1.0]))
    torch.testing.assert_close(at_one, x0 + (x - x0) / 1e4, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [(euler, 5), (heun, 9), (dpmpp_2s, 9), (dpmpp_sde, 9), (dpmpp_2m, 5), (dpmpp_3m, 5), (unipc, 5), (lms, 5), (plms, 6),
     (lcm, 5)],
)  # fmt: skip
def test_evaluations_callback_and_inputs(solver: Solver, evaluations: int):
    x, sigmas, calls, progress = start(80.0), grid(Karras(), 5), [], []
    before = x.clone()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == ()
        assert sigma.device.type == "cpu"
        calls.append(sigma.item())
        return gaussian(x, sigma)

    solver(denoise, x, sigmas, lambda *_: torch.zeros_like(x), lambda i, x0_hat: progress.append((i, x0_hat.shape)))
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
        solver(gaussian, torch.zeros(1, 1, 2, 2), torch.tensor(sigmas), lambda *_: 0.0)


@pytest.mark.parametrize("solver", ALL)
def test_bad_x(solver: Solver):
    with pytest.raises(UserError, match="x holds a value that is not finite"):
        solver(gaussian, torch.full((1, 1, 2, 2), math.nan), torch.tensor([1.0, 0.0]), lambda *_: 0.0)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of data that is N(±1, STD²), either with probability ½."""
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    return (s2 * torch.tanh(x / (STD**2 + s2)) + STD**2 * x) / (STD**2 + s2)


def short_start(schedule: Karras, steps: int) -> Tensor:
    """A geometric grid whose first two steps are of the square of its step: multistep methods begin with a low order."""
    sigmas = schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    h = (sigmas[0] / sigmas[1]).log()
    return torch.cat([sigmas[:1], sigmas[0] * (-torch.tensor([0.25, 0.5]).double() * h**2).exp(), sigmas[1:]])


@pytest.mark.parametrize(
    ("solver", "expected"),
    [*((s, n) for s, n in ORDERS.items() if s not in (unipc, UNIPC_3)), (partial(dpmpp_3m, curvature=1.0), 2)],
)
def test_order_of_convergence_on_a_mixture(solver: Solver, expected: int):
    """Nonlinear, against the limit. The reference implementations' DPM++ 3M (curvature 1) is of second order."""
    schedule = Karras(0.05, 20.0, 1000.0)
    x = start(20.0)
    exact = dpmpp_3m(mixture, x, short_start(schedule, 8192))
    coarse, fine = ((solver(mixture, x, short_start(schedule, n)) - exact).square().mean().sqrt() for n in (256, 512))
    assert (coarse / fine).log2().item() == pytest.approx(expected, abs=0.25)


# jumping to D and back samples the data with a consistency model's D alone: lcm has a test of its own
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "lcm"])
def test_stochastic_solvers_reach_the_mean_and_covariance_of_the_data(name: str):
    """Correlated two-dimensional data, 10,000 samples, from σ = 20 to 0."""
    mean, covariance = torch.tensor([0.7, -0.4]), torch.tensor([[0.5, 0.3], [0.3, 0.4]])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        gain = covariance.double() @ torch.linalg.inv(covariance.double() + sigma**2 * torch.eye(2).double())
        return mean.view(1, 2, 1, 1) + torch.einsum("dc,bchw->bdhw", gain.float(), x - mean.view(1, 2, 1, 1))

    random, shape, solver = KeyedRandom(0, torch.arange(10_000)), (2, 1, 1), STOCHASTIC[name]
    sigmas = grid(Karras(0.02, 20.0), 240 if name.startswith("dd") else 60)  # the first-order ones
    x0 = solver(denoise, 20 * random.normal("start", shape), sigmas, BrownianPath(random, shape)).flatten(1)
    torch.testing.assert_close(x0.mean(dim=0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x0.T.cov(), covariance, rtol=0, atol=0.025)


def test_lcm_samples_the_data_with_a_consistency_function():
    """f(x, σ) that jumps along the ODE to its end: every step's result is a sample of the data."""
    random, shape = KeyedRandom(0, torch.arange(20_000)), (1, 1, 1)
    consistency = lambda x, sigma: gaussian_flow(x, sigma.item(), 0.0)  # noqa: E731
    x = MEAN + math.sqrt(STD**2 + 400) * random.normal("start", shape)
    x0 = lcm(consistency, x, torch.tensor([20.0, 3.0, 0.5, 0.0]), BrownianPath(random, shape))
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x0.std().item() == pytest.approx(STD, abs=0.02)


def test_sde_solvers_converge_to_one_sample():
    """The Brownian path is the same for every number of steps."""
    random, shape = KeyedRandom(0, torch.arange(4)), (1, 4, 4)
    x, path = 10 * random.normal("start", shape), BrownianPath(random, shape)
    runs = [dpmpp_sde(mixture, x, grid(Karras(0.02, 10.0), n), path) for n in (25, 75, 225)]
    coarse, fine = ((run - runs[2]).square().mean().sqrt().item() for run in runs[:2])
    assert fine < 0.7 * coarse
    assert fine < 0.1


def test_churn_is_algorithm_2():
    """As printed, with S_churn = 10 inside [0.1, 30] and S_noise = 1.01."""
    x, sigmas, draws = start(80.0), grid(Karras(), 12).double(), []
    eps = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype) for i in range(12)]
    expected = x
    for i, (t, t_next) in enumerate(pairwise(sigmas.tolist())):
        gamma = min(10 / 12, math.sqrt(2) - 1) if 0.1 <= t <= 30 else 0.0
        t_hat = t + gamma * t
        x_hat = expected + math.sqrt(t_hat**2 - t**2) * 1.01 * eps[i]
        d = (x_hat - gaussian(x_hat, torch.tensor(t_hat, dtype=x.dtype))) / t_hat
        expected = x_hat + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (expected - gaussian(expected, torch.tensor(t_next, dtype=x.dtype))) / t_next
            expected = x_hat + (t_next - t_hat) * (d + d_next) / 2

    def noise(sigma: float, sigma_next: float) -> Tensor:
        draws.append(sigma)
        return eps[sigmas.tolist().index(sigma)]

    out = heun(gaussian, x, sigmas, noise, churn=10, churn_min=0.1, churn_max=30, churn_noise=1.01)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    assert draws == [sigma for sigma in sigmas.tolist() if 0.1 <= sigma <= 30]


def test_restart_goes_through_its_interval_again():
    levels = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(round(sigma.item(), 3))
        return gaussian(x, sigma)

    x, seen = start(4.0), []
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0])
    restart(denoise, x, sigmas, lambda *_: torch.zeros_like(x), lambda i, _: seen.append(i), solver=euler, low=0.6,
            high=2.5, times=2)  # fmt: skip
    assert levels == [4, 2, 2, 2, 1, 0.5]
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (partial(euler, eta=1.0), "adds noise and was given none"),
        (lcm, "adds noise and was given none"),
        (partial(heun, churn=1.0), "adds noise and was given none"),
        (partial(euler, eta=-1.0), r"eta \(or churn\) is -1.0"),
        (partial(unipc, order=4), "order is 4; give 1, 2 or 3"),
        (partial(lms, order=0), "order is 0; give at least 1"),
        (partial(restart, low=0.01, high=0.02, times=0), "0 noise level.* wider interval"),
        (partial(restart, solver=restart), "another solver"),
    ],
)
def test_bad_settings(run: Solver, message: str):
    with pytest.raises(UserError, match=message):
        run(gaussian, torch.zeros(1, 1, 2, 2), torch.tensor([2.0, 1.0, 0.0]))


class NoWaiting(TorchDispatchMode):
    """Fails where a number is read out of a tensor, which on a GPU waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


# restart checks x between its parts, which is a handful of times a sample and not once a step
@pytest.mark.parametrize("solver", [solver for solver in ALL if solver is not restart])
def test_no_step_waits_for_the_device(solver: Solver):
    random, shape = KeyedRandom(0, torch.arange(2)), (1, 4, 4)
    x, path, modes = 80.0 * random.normal("start", shape), BrownianPath(random, shape), []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if not modes:  # from the first evaluation on; the inputs were checked before it
            modes.append(NoWaiting())
            modes[0].__enter__()
        return gaussian(x, sigma)

    try:
        solver(denoise, x, grid(Karras(), 24), path)
    finally:
        modes[0].__exit__(None, None, None)
