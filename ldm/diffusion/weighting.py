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


def debiased(sigma: Tensor) -> Tensor:
    """1/σ: the mean squared error on the noise over √SNR (Yu et al. 2023, "Debias the training of diffusion models")."""
    return 1 / sigma


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
            raise UserError(f"{type(self).__name__}: gamma is {self.gamma}; give a number > 0 (the paper uses 5)")

    def __call__(self, sigma: Tensor) -> Tensor:
        return snr(sigma).clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR(MinSNR):
    """1/(σ² + 1/γ): min-SNR with a smooth knee (Crowson et al. 2024, "Hourglass diffusion transformers", section 4.5).

    Raises UserError unless gamma > 0.
    """

    def __call__(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + 1 / self.gamma)


@dataclass(frozen=True)
class P2:
    """SNR/(k + SNR)^γ: less weight where noise is small (Choi et al. 2022, "Perception prioritized training", equation 9).

    Raises UserError unless gamma >= 0 and k > 0.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.gamma < math.inf and 0 < self.k < math.inf):
            raise UserError(f"{self}: give gamma >= 0 and k > 0")

    def __call__(self, sigma: Tensor) -> Tensor:
        return snr(sigma) / (self.k + snr(sigma)) ** self.gamma
