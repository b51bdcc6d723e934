"""Guidance: closes over a denoiser and what it is conditioned on, and hands the solver a plain DenoiseFn.

A linear rule on D is the same rule on ε, v and flow: each is affine in D, with the same coefficients in every branch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import DenoiseFn, Denoiser
from ldm.errors import UserError

Guidance = Callable[[Denoiser, Conditioning, Conditioning], DenoiseFn]  # (denoiser, cond, null) -> (x, sigma) -> x0_hat


@dataclass(frozen=True)
class ClassifierFree:
    """D_null + scale·(D_cond − D_null) (Ho & Salimans 2022, equation 6, whose w is scale − 1).

    Scale 1 is without guidance and 0 is unconditional, each one call of B rows; any other scale is one call of 2B rows.
    Raises UserError unless scale is finite and >= 0.
    """

    scale: float

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise UserError(f"guidance scale is {self.scale}; give a number >= 0 (1 is without guidance)")

    def __call__(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """cond: B rows; null: 1 row or B rows. The DenoiseFn takes x (B, C, H, W) and sigma (B,)."""
        null = _expand(null, len(cond.tokens))
        if self.scale in (0, 1):
            only = cond if self.scale == 1 else null
            return lambda x, sigma: denoiser(x, sigma, only)
        both = null.cat(cond)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            x0_null, x0_cond = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return x0_null + self.scale * (x0_cond - x0_null)

        return denoise


def _expand(cond: Conditioning, rows: int) -> Conditioning:
    return Conditioning(*(None if part is None else part.expand(rows, *part.shape[1:]) for part in cond))
