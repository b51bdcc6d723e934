"""Solvers of the probability-flow ODE dx/dσ = (x − D(x; σ))/σ (Karras et al. 2022, equations 1 and 3): pure functions.

Each takes denoise: (x, sigma (B,)) -> x0_hat, x: (B, C, H, W) at noise level sigmas[0], and sigmas: (N + 1,) strictly
falling, the last >= 0. Each returns x at sigmas[-1] (which is x0 at 0) and calls `callback(i, x0_hat)` in step i of N.
Other sigmas, or an x that is not finite, raise UserError.

A step is r·x + (1−r)·x0_hat with r = σ_next/σ: exact where D is constant, and without the cancellation that
x + (σ_next − σ)·(x − D)/σ has at large σ. The solvers differ only in the x0_hat that they step towards.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import DenoiseFn
from ldm.errors import UserError

Solver = Callable[[DenoiseFn, Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor], None]


def euler(denoise: DenoiseFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """First order, one evaluation a step. Equals DDIM with η = 0 (Song et al. 2021, equation 12)."""
    for i, (sigma, sigma_next) in enumerate(_steps(x, sigmas)):
        x0_hat = denoise(x, _rows(x, sigma))
        if callback:
            callback(i, x0_hat)
        x = _towards(x0_hat, x, sigma_next / sigma)
    return x


def heun(denoise: DenoiseFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Second order, two evaluations a step but for a last step to 0 (Karras et al. 2022, algorithm 1)."""
    for i, (sigma, sigma_next) in enumerate(_steps(x, sigmas)):
        x0_hat = denoise(x, _rows(x, sigma))
        if callback:
            callback(i, x0_hat)
        ratio = sigma_next / sigma
        if ratio > 0:
            # the mean of the slopes at both ends, with the Euler step substituted and collected in x0_hat
            x0_next = denoise(_towards(x0_hat, x, ratio), _rows(x, sigma_next))
            x0_hat = x0_hat + (x0_next - x0_hat) / (2 * ratio)
        x = _towards(x0_hat, x, ratio)
    return x


def dpmpp_2m(denoise: DenoiseFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Second order in log σ, one evaluation a step (DPM-Solver++(2M): Lu et al. 2022, algorithm 2).

    The first step, and a last step to 0, are first order.
    """
    previous: tuple[Tensor, float] | None = None  # x0_hat and the log σ step of the step before
    for i, (sigma, sigma_next) in enumerate(_steps(x, sigmas)):
        x0_hat = denoise(x, _rows(x, sigma))
        if callback:
            callback(i, x0_hat)
        if sigma_next == 0:
            return x0_hat
        h = math.log(sigma / sigma_next)
        target = x0_hat
        if previous:
            x0_before, h_before = previous
            target = x0_hat + (x0_hat - x0_before) * (h / (2 * h_before))
        x = _towards(target, x, sigma_next / sigma)
        previous = x0_hat, h
    return x


def _towards(x0_hat: Tensor, x: Tensor, ratio: float) -> Tensor:
    return ratio * x + (1 - ratio) * x0_hat


def _rows(x: Tensor, sigma: float) -> Tensor:
    return x.new_full((len(x),), sigma)


def _steps(x: Tensor, sigmas: Tensor) -> Iterator[tuple[float, float]]:
    """(σ, σ_next) of every step, as floats: read once, so that no step waits for the device."""
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
    return pairwise(levels)
