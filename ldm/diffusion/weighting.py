"""Weights of |D − x0|² as functions of σ: (B,) -> (B,), same dtype. σ > 0; the signal-to-noise ratio is 1/σ²."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.parameterization import Parameterization
from ldm.errors import UserError

Weighting = Callable[[Tensor], Tensor]


def uniform(sigma: Tensor) -> Tensor:
    """1: the mean squared error on x0."""
    return torch.ones_like(sigma)


def snr(sigma: Tensor) -> Tensor:
    """1/σ²: the mean squared error on the noise, whatever the network predicts (Ho et al. 2020, equation 14)."""
    return sigma**-2


@dataclass(frozen=True)
class Classical:
    """1/c_out²: the mean squared error on what the network predicts; `Classical(EDM())` is EDM's λ(σ) (table 1)."""

    parameterization: Parameterization

    def __call__(self, sigma: Tensor) -> Tensor:
        return self.parameterization.loss_weight(sigma)


@dataclass(frozen=True)
class MinSNR:
    """min(1/σ², γ) (Hang et al. 2023): on |D − x0|² the same for every parameterization.

    Raises UserError unless gamma > 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise UserError(f"MinSNR: gamma is {self.gamma}; give a number > 0 (the paper uses 5)")

    def __call__(self, sigma: Tensor) -> Tensor:
        return snr(sigma).clamp(max=self.gamma)
