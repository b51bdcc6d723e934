"""Solvers of dx/dσ = (x − D(x; σ))/σ and of the SDEs with the same marginals (Karras et al. 2022, equations 1, 3 and 6).

Each is a pure function of denoise: (x, sigma ()) -> x0_hat; x: (B, C, H, W) at noise level sigmas[0]; sigmas: (N + 1,)
strictly falling, the last >= 0; noise: (σ, σ_next) -> standard normal like x, which only stochastic ones ask for. Each
returns x at sigmas[-1] (which is x0 at 0) and calls `callback(i, x0_hat)` in step i of N. Other sigmas, an x that is not
finite, or a stochastic solver without noise raise UserError.

x = x0 + σ·noise has no scale that depends on σ, and the name of many a solver disappears with it: DDIM is `euler`; DDPM,
DDIM with η = 1 and Euler ancestral are `euler` with eta = 1; the SDE variants of DPM-Solver++ are the ODE ones with eta = 1.

A step is r·x + (1−r)·x0_hat with r = σ_next/σ: exact where D is constant, and without the cancellation that
x + (σ_next − σ)·(x − D)/σ has at large σ. Noise levels are floats on the host: no step waits for the device.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import DenoiseFn
from ldm.diffusion.noise import Noise
from ldm.errors import UserError

Callback = Callable[[int, Tensor], None]
Solver = Callable[..., Tensor]  # (denoise, x, sigmas, noise, callback) -> x at sigmas[-1]


def euler(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """First order, one evaluation a step: DDIM(η) (Song et al. 2021, equation 12).

    eta: share of the posterior's noise that a step adds back. 0 is the ODE: Euler, DDIM. 1 is DDPM (Ho et al. 2020,
    algorithm 2, with the posterior's variance) and k-diffusion's Euler ancestral.
    """
    for i, sigma, sigma_next in _steps(x, sigmas, noise, eta):
        x0_hat = _evaluate(denoise, x, sigma, i, callback)
        down, up = _ancestral(sigma, sigma_next, eta)
        x = _renoise(_towards(x0_hat, x, down / sigma), up, noise, sigma, sigma_next)
    return x


def heun(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, churn: float = 0.0, churn_min: float = 0.0, churn_max: float = math.inf, churn_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Second order, two evaluations a step but for a last step to 0 (Karras et al. 2022, algorithms 1 and 2).

    churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax and S_noise of algorithm 2, which first lifts x to a
    higher noise level in every step inside [churn_min, churn_max]. 0 is algorithm 1, the ODE.
    """
    lift = min(churn / max(len(sigmas) - 1, 1), math.sqrt(2) - 1)
    for i, sigma, sigma_next in _steps(x, sigmas, noise, churn):
        gamma = lift if churn_min <= sigma <= churn_max else 0.0
        higher = sigma * (1 + gamma)
        x = _renoise(x, churn_noise * math.sqrt(higher**2 - sigma**2), noise, sigma, sigma_next)
        x0_hat = _evaluate(denoise, x, higher, i, callback)
        ratio = sigma_next / higher
        if ratio > 0:
            # the mean of the slopes at both ends, with the Euler step substituted and collected in x0_hat
            x0_next = _evaluate(denoise, _towards(x0_hat, x, ratio), sigma_next)
            x0_hat = x0_hat + (x0_next - x0_hat) / (2 * ratio)
        x = _towards(x0_hat, x, ratio)
    return x


def dpmpp_2s(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Second order, two evaluations a step but for a last step to 0 (DPM-Solver++(2S): Lu et al. 2022, algorithm 1).

    eta: as in `euler`; 1 is k-diffusion's 2S ancestral.
    """
    for i, sigma, sigma_next in _steps(x, sigmas, noise, eta):
        x0_hat = _evaluate(denoise, x, sigma, i, callback)
        down, up = _ancestral(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            x0_hat = _evaluate(denoise, _towards(x0_hat, x, middle / sigma), middle)
        x = _renoise(_towards(x0_hat, x, down / sigma), up, noise, sigma, sigma_next)
    return x


def dpmpp_sde(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, eta: float = 1.0, r: float = 0.5,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) for the SDE, two evaluations a step, with noise at the midpoint too (k-diffusion's DPM++ SDE).

    r: where between the two levels, in log σ, the second evaluation is.
    """
    for i, sigma, sigma_next in _steps(x, sigmas, noise, eta):
        x0_hat = _evaluate(denoise, x, sigma, i, callback)
        if sigma_next == 0:
            return x0_hat
        middle = sigma ** (1 - r) * sigma_next**r
        down, up = _ancestral(sigma, middle, eta)
        at_middle = _renoise(_towards(x0_hat, x, down / sigma), up, noise, sigma, middle)
        x0_middle = _evaluate(denoise, at_middle, middle)
        x0_hat = torch.lerp(x0_hat, x0_middle, 1 / (2 * r))
        down, up = _ancestral(sigma, sigma_next, eta)
        x = _renoise(_towards(x0_hat, x, down / sigma), up, noise, sigma, sigma_next)
    return x


def dpmpp_2m(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Second order in log σ, one evaluation a step (DPM-Solver++(2M): Lu et al. 2022, algorithm 2).

    The first step, and a last step to 0, are first order. eta = 1 is SDE-DPM-Solver++(2M) (midpoint form).
    """
    before: deque[tuple[Tensor, float]] = deque(maxlen=1)  # x0_hat and the log σ step of the step before
    for i, sigma, sigma_next in _steps(x, sigmas, noise, eta):
        x0_hat = _evaluate(denoise, x, sigma, i, callback)
        if sigma_next == 0:
            return x0_hat
        h = math.log(sigma / sigma_next)
        target = x0_hat
        for x0_before, h_before in before:
            target = x0_hat + (x0_hat - x0_before) * (h / (2 * h_before))
        x = _exponential(target, x, sigma, sigma_next, eta, noise)
        before.append((x0_hat, h))
    return x


def dpmpp_3m(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, eta: float = 0.0, curvature: float = 2.0,
) -> Tensor:  # fmt: skip
    """Third order in log σ, one evaluation a step (DPM-Solver++(3M)); eta = 1 is its SDE variant.

    Steps one and two, and a last step to 0, are of first and second order.

    curvature: factor from the second divided difference to the second derivative, which is 2. The authors' own code,
    diffusers and k-diffusion leave it out (1) and are of second order: measured in bench/solver_parity.py.
    """
    history: deque[tuple[Tensor, float]] = deque(maxlen=2)  # (x0_hat, h) of the steps before, newest first
    for i, sigma, sigma_next in _steps(x, sigmas, noise, eta):
        x0_hat = _evaluate(denoise, x, sigma, i, callback)
        if sigma_next == 0:
            return x0_hat
        h = math.log(sigma / sigma_next)
        k = h * (1 + eta)
        phi_2 = math.expm1(-k) / k + 1
        phi_3 = phi_2 / k - 0.5
        gain = -math.expm1(-k)  # what `_exponential` multiplies its target by
        target = x0_hat
        if len(history) == 1:
            ((x0_1, h_1),) = history
            target = x0_hat + (x0_hat - x0_1) * (h / h_1) * (phi_2 / gain)
        elif len(history) == 2:
            (x0_1, h_1), (x0_2, h_2) = history
            r_0, r_1 = h_1 / h, h_2 / h
            slope_0, slope_1 = (x0_hat - x0_1) / r_0, (x0_1 - x0_2) / r_1
            first = slope_0 + (slope_0 - slope_1) * (r_0 / (r_0 + r_1))
            second = curvature * (slope_0 - slope_1) / (r_0 + r_1)
            target = x0_hat + (first * phi_2 - second * phi_3) / gain
        x = _exponential(target, x, sigma, sigma_next, eta, noise)
        history.appendleft((x0_hat, h))
    return x


def unipc(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, order: int = 2,
) -> Tensor:  # fmt: skip
    """Predictor and corrector of one order, one evaluation a step (UniPC, B₂(h), x0-prediction: Zhao et al. 2023).

    order: 1, 2 or 3. The order is lower in the first and the last steps. Raises UserError for another order.
    """
    if order not in (1, 2, 3):
        raise UserError(f"unipc: order is {order}; give 1, 2 or 3")
    points: deque[tuple[float, Tensor]] = deque(maxlen=order)  # (log σ, x0_hat) at the levels before, newest first
    steps = list(_steps(x, sigmas, noise))
    start, order_now = x, 1
    for i, sigma, sigma_next in steps:
        x0_hat = _evaluate(denoise, x, sigma, i, callback)
        if points:
            x = _unified(start, sigma, points, order_now, x0_hat)
        points.appendleft((math.log(sigma), x0_hat))
        if sigma_next == 0:
            return x0_hat
        start, order_now = x, min(order, len(points), len(steps) - i)
        x = _unified(start, sigma_next, points, order_now)
    return x


def lms(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, order: int = 4,
) -> Tensor:  # fmt: skip
    """Linear multistep (Adams-Bashforth on the levels themselves), one evaluation a step, as in k-diffusion.

    order: how many slopes the polynomial goes through, at least 1.
    """
    if order < 1:
        raise UserError(f"lms: order is {order}; give at least 1")
    slopes: deque[tuple[float, Tensor]] = deque(maxlen=order)
    x, dtype = x.double(), x.dtype  # slopes over long steps: what float32 rounds in one is multiplied by σ
    for i, sigma, sigma_next in _steps(x, sigmas, noise):
        x0_hat = _evaluate(denoise, x.to(dtype), sigma, i, callback)
        slopes.appendleft((sigma, (x - x0_hat) / sigma))
        nodes = [s for s, _ in slopes]
        for weight, (_, slope) in zip(_lagrange_integrals(nodes, sigma, sigma_next), slopes, strict=True):
            x = x + weight * slope
    return x.to(dtype)


def plms(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """Pseudo linear multistep of order 4 (PNDM: Liu et al. 2022, equation 12), Stable Diffusion v1's default.

    One evaluation a step, two in the first. Its coefficients are those of equal steps, whatever the grid is.
    """
    slopes: deque[Tensor] = deque(maxlen=4)  # newest first
    x, dtype = x.double(), x.dtype  # as in `lms`
    for i, sigma, sigma_next in _steps(x, sigmas, noise):
        x0_hat = _evaluate(denoise, x.to(dtype), sigma, i, callback)
        slopes.appendleft((x - x0_hat) / sigma)
        if len(slopes) == 1 and sigma_next > 0:
            ahead = _towards(x0_hat, x, sigma_next / sigma)
            mean = (slopes[0] + (ahead - _evaluate(denoise, ahead.to(dtype), sigma_next)) / sigma_next) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(slopes) - 1]
            terms = (weight * slope for weight, slope in zip(weights, slopes, strict=True))
            mean = sum(terms, x.new_zeros(()))
        x = x + (sigma_next - sigma) * mean
    return x.to(dtype)


def lcm(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """Multistep consistency sampling: jump to x0_hat, add the next level's noise (Song et al. 2023, algorithm 1; LCM)."""
    for i, sigma, sigma_next in _steps(x, sigmas, noise, 1.0):
        x = _renoise(_evaluate(denoise, x, sigma, i, callback), sigma_next, noise, sigma, sigma_next)
    return x


def restart(
    denoise: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, callback: Callback | None = None,
    *, solver: Solver = heun, low: float = 0.1, high: float = 0.4, times: int = 2,
) -> Tensor:  # fmt: skip
    """A solver that goes back up: from about σ = `low` to `high` by adding noise, then down again, `times` times.

    Xu et al. 2023 ("Restart sampling"), one interval, with the grid's own levels in it. An interval that holds fewer
    than two of the grid's levels raises UserError.
    """
    if solver is restart or times < 0:
        raise UserError(f"restart: solver={solver}, times={times}; give another solver and times >= 0")
    levels = [sigma for _, sigma, _ in _steps(x, sigmas, noise, float(times))]
    inside = [i for i, sigma in enumerate(levels) if low <= sigma <= high]
    if len(inside) < 2:
        raise UserError(
            f"restart: {len(inside)} noise level(s) between low={low:g} and high={high:g}; give a wider interval"
        )
    top, bottom = inside[0], inside[-1]
    x = solver(denoise, x, sigmas[: bottom + 1], noise, callback)
    back_up = math.sqrt(levels[top] ** 2 - levels[bottom] ** 2)
    for again in range(times):
        assert noise is not None  # or `_steps` had refused
        # levels above the grid's are no step of the path: their noise is independent of every step's
        x = x + back_up * noise((again + 2) * (1 + levels[0]), (again + 1) * (1 + levels[0]))
        x = solver(denoise, x, sigmas[top : bottom + 1], noise)
    rest = None if callback is None else lambda i, x0_hat: callback(bottom + i, x0_hat)
    return solver(denoise, x, sigmas[bottom:], noise, rest)


_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _evaluate(denoise: DenoiseFn, x: Tensor, sigma: float, i: int = 0, callback: Callback | None = None) -> Tensor:
    x0_hat = denoise(x, torch.tensor(sigma, dtype=x.dtype))
    if callback:
        callback(i, x0_hat)
    return x0_hat


def _towards(x0_hat: Tensor, x: Tensor, ratio: float) -> Tensor:
    return ratio * x + (1 - ratio) * x0_hat


def _renoise(x: Tensor, amount: float, noise: Noise | None, sigma: float, sigma_next: float) -> Tensor:
    if amount == 0:
        return x
    assert noise is not None  # or `_steps` had refused
    return x + amount * noise(sigma, sigma_next)


def _ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): the level that the ODE goes to, and the noise added there, down² + up² = σ_next²."""
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up


def _exponential(target: Tensor, x: Tensor, sigma: float, sigma_next: float, eta: float, noise: Noise | None) -> Tensor:
    """The step that is exact for a constant D, of the SDE with `eta` times the reverse diffusion's noise."""
    h = math.log(sigma / sigma_next)
    up = sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
    return _renoise(_towards(target, x, math.exp(-(1 + eta) * h)), up, noise, sigma, sigma_next)


def _unified(
    x: Tensor, sigma_next: float, points: deque[tuple[float, Tensor]], order: int, x0_next: Tensor | None = None
) -> Tensor:
    """UniP of this order, or UniC when x0_hat at σ_next is known (Zhao et al. 2023, algorithms 5 to 8).

    x: at the level of points[0], which is (log σ, x0_hat); the other points are those before.
    """
    log_sigma, x0_hat = points[0]
    h = math.log(sigma_next) - log_sigma  # −h of the paper: λ = −log σ
    ratios = [(points[j][0] - log_sigma) / h for j in range(1, order)]
    slopes = [(points[j][1] - x0_hat) / ratio for j, ratio in zip(range(1, order), ratios, strict=True)]
    if x0_next is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, x0_next - x0_hat]
    target = x0_hat
    for weight, slope in zip(_unified_weights(ratios, h), slopes, strict=True):
        target = target + weight * slope
    return _towards(target, x, math.exp(h))


def _unified_weights(ratios: list[float], h: float) -> list[float]:
    """Equation 11 of Zhao et al. 2023 with B(h) = e^h − 1."""
    n = len(ratios)
    if n < 2:
        return [0.5] * n  # the authors' choice, which keeps second order
    phi, b = math.expm1(h) / h - 1, []
    for k in range(1, n + 1):
        b.append(phi * math.factorial(k) / math.expm1(h))
        phi = phi / h - 1 / math.factorial(k + 1)
    powers = torch.tensor([[ratio**k for ratio in ratios] for k in range(n)], dtype=torch.float64)
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()


def _lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """∫ from start to end of each Lagrange polynomial over the nodes, which are normalized first: σ reaches 1e3."""
    scale = nodes[0]
    points = torch.tensor(nodes, dtype=torch.float64) / scale
    powers = torch.arange(len(nodes), dtype=torch.float64)
    moments = [((end / scale) ** (k + 1) - (start / scale) ** (k + 1)) / (k + 1) for k in range(len(nodes))]
    vandermonde = points[None, :] ** powers[:, None]  # row k: nodes^k; weights integrate every power exactly
    return (scale * torch.linalg.solve(vandermonde, torch.tensor(moments, dtype=torch.float64))).tolist()


def _steps(
    x: Tensor, sigmas: Tensor, noise: Noise | None, randomness: float = 0.0
) -> Iterator[tuple[int, float, float]]:
    """(i, σ, σ_next) of every step, as floats: read once, so that no step waits for the device."""
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise UserError(f"sigmas has shape {tuple(sigmas.shape)}; give a list of at least 2 noise levels")
    levels = sigmas.tolist()
    if not all(math.isfinite(sigma) for sigma in levels):
        raise UserError("sigmas holds a value that is not finite; give a schedule with a finite sigma_max")
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if sigma <= sigma_next:
            raise UserError(
                f"sigmas[{i}] = {sigma:g} is followed by {sigma_next:g}; give strictly falling noise levels"
            )
    if levels[-1] < 0:
        raise UserError(f"sigmas ends at {levels[-1]:g}; give noise levels >= 0")
    if not torch.isfinite(x).all():
        raise UserError("x holds a value that is not finite; check the noise or the latents that sampling starts from")
    if not 0 <= randomness < math.inf:
        raise UserError(f"a solver's eta (or churn) is {randomness}; give a number >= 0 (0 is without noise)")
    if randomness > 0 and noise is None:
        raise UserError("this solver adds noise and was given none; pass noise=BrownianPath(random, shape)")
    return ((i, sigma, sigma_next) for i, (sigma, sigma_next) in enumerate(pairwise(levels)))
