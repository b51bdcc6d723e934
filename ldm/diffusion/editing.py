"""Editing without training: everything here is a DenoiseFn around a DenoiseFn, or a start other than pure noise.

z, x: (B, C, H, W) normalized latents; noise: standard normal like them; sigmas: a falling grid that ends at 0.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import DenoiseFn
from ldm.diffusion.solvers import Solver
from ldm.errors import UserError


def start_from(z: Tensor, noise: Tensor, sigmas: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """img2img (SDEdit: Meng et al. 2022): (x, sigmas) to solve from, z covered by noise of the level of sigmas[0].

    strength: share of the grid's steps that are taken: 1 takes all of them and keeps next to nothing of z, near 0 is
    nearly z. Variations of a picture are this with other noise. Raises UserError unless 0 < strength <= 1.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; give a number in (0, 1]: 1 takes all steps of the grid")
    steps = len(sigmas) - 1
    taken = max(1, round(strength * steps))
    sigmas = sigmas[steps - taken :]
    return z + sigmas[0].item() * noise, sigmas


def keep(denoise: DenoiseFn, z: Tensor, mask: Tensor) -> DenoiseFn:
    """Training-free inpainting: x0_hat is z wherever mask is 0.

    Started from `noise·σ` or `z + noise·σ`, x follows z + σ·noise there, so that both parts have one noise level.

    mask: (B or 1, 1, H, W) in [0, 1], 1 where to paint. Raises UserError for another shape or range.
    """
    _check_mask(mask, z)
    return lambda x, sigma: torch.lerp(z, denoise(x, sigma), mask.to(z))


def extend(z: Tensor, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> tuple[Tensor, Tensor]:
    """Outpainting: (canvas, mask) for `keep`, z within a border of so many latent pixels, 1 where to paint.

    Raises UserError for a negative border, or none at all.
    """
    border = (left, right, top, bottom)
    if min(border) < 0 or max(border) == 0:
        raise UserError(f"extend: left, right, top, bottom are {border}; give numbers >= 0, not all 0")
    return F.pad(z, border), F.pad(torch.zeros_like(z[:, :1]), border, value=1.0)


def repaint(
    denoise: DenoiseFn,
    z: Tensor,
    mask: Tensor,
    sigmas: Tensor,
    noise: Callable[[str], Tensor],
    solver: Solver,
    jump: int = 5,
    times: int = 3,
    **options: object,
) -> Tensor:
    """RePaint (Lugmayr et al. 2022, algorithm 1): inpainting that goes back up `jump` steps, `times` times in all.

    What is painted and what is kept come to agree. Every round starts from fresh noise on both.

    Args:
        noise: purpose -> standard normal like z, for instance `lambda p: random.normal(p, z.shape[1:])`.
        solver: takes each run of `jump` steps; `options` are passed on to it.
    """
    if jump < 1 or times < 1:
        raise UserError(f"repaint: jump={jump}, times={times}; give both >= 1")
    kept = keep(denoise, z, mask)
    steps = len(sigmas) - 1
    x = z + sigmas[0].item() * noise("repaint")
    for begin in range(0, steps, jump):
        part = sigmas[begin : min(begin + jump, steps) + 1]
        high, low = part[0].item(), part[-1].item()
        for again in range(times):
            if again > 0:
                x = x + math.sqrt(high**2 - low**2) * noise(f"repaint {begin} {again}")
            x = solver(kept, x, part, **options)
    return x


def invert(denoise: DenoiseFn, z: Tensor, sigmas: Tensor, iterations: int = 1) -> Tensor:
    """DDIM inversion (Song et al. 2021, section 5.3): the x at sigmas[0] from which `euler` comes back to z.

    iterations: fixed-point iterations of every step (Pan et al. 2023); 1 is plain DDIM inversion, which takes x0_hat at
    the step's lower end, more come closer to the exact inverse. Decoding with guidance other than 1 does not come back.
    Raises UserError unless sigmas falls to 0 and iterations >= 1.
    """
    levels = sigmas.tolist()
    if levels[-1] != 0 or any(a <= b for a, b in pairwise(levels)) or iterations < 1:
        raise UserError(
            f"invert: sigmas runs from {levels[0]:g} to {levels[-1]:g}, iterations={iterations}; "
            "give levels that fall strictly to 0 and iterations >= 1"
        )
    x = z
    for sigma, sigma_next in pairwise(reversed(levels)):
        guess, at = x, sigma or sigma_next
        for _ in range(iterations):
            x0_hat = denoise(guess, torch.tensor(at, dtype=z.dtype))
            guess = x + (sigma_next - sigma) * (guess - x0_hat) / at
            at = sigma_next  # the slope that `euler` will take on its way down
        x = guess
    return x


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Between two noises, on the sphere, so that what is between them is as likely: (B, C, H, W), t in [0, 1].

    With small t, a variation of the picture that `a` gives.
    """
    _check_share(t)
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (F.normalize(flat_a, dim=1) * F.normalize(flat_b, dim=1)).sum(dim=1).clamp(-1, 1)
    angle = cosine.acos().view(-1, *[1] * (a.dim() - 1))
    near = angle.sin() < 1e-6  # parallel: the sphere is flat here
    angle = torch.where(near, torch.ones_like(angle), angle)
    on_sphere = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.where(near, torch.lerp(a.double(), b.double(), t), on_sphere).to(a.dtype)


def interpolate(a: Conditioning, b: Conditioning, t: float) -> Conditioning:
    """Between two prompts: embeddings token by token on their sphere, the rest straight; a token is real if it is in either.

    Raises UserError unless both have the same shapes and t is in [0, 1].
    """
    _check_share(t)
    shapes = [[None if part is None else tuple(part.shape) for part in cond] for cond in (a, b)]
    if shapes[0] != shapes[1]:
        raise UserError(f"interpolate: the conditionings' shapes are {shapes[0]} and {shapes[1]}; give equal shapes")
    tokens = slerp(a.tokens.flatten(0, 1), b.tokens.flatten(0, 1), t).view_as(a.tokens)
    spatial = None if a.spatial is None or b.spatial is None else torch.lerp(a.spatial, b.spatial, t)
    return Conditioning(tokens, a.mask | b.mask, torch.lerp(a.vector, b.vector, t), spatial)


def _check_share(t: float) -> None:
    if not 0 <= t <= 1:
        raise UserError(f"t is {t}; give a number in [0, 1]: 0 is the first, 1 the second")


def _check_mask(mask: Tensor, z: Tensor) -> None:
    if mask.dim() != 4 or mask.shape[0] not in (1, len(z)) or mask.shape[1] != 1 or mask.shape[2:] != z.shape[2:]:
        raise UserError(
            f"mask has shape {tuple(mask.shape)} for latents of {tuple(z.shape)}; "
            f"give ({len(z)} or 1, 1, {z.shape[2]}, {z.shape[3]})"
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise UserError("mask holds values outside [0, 1]; give 1 where to paint and 0 where to keep")
