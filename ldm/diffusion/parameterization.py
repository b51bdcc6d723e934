"""What the network F predicts, as four scalars of σ: x0_hat = c_skip·x + c_out·F(c_in·x, c_noise), x = x0 + σ·noise.

The preconditioning of Karras et al. 2022 ("Elucidating the design space of diffusion-based generative models",
equation 7), with ε-, v-, x0- and flow-prediction in the same form. Nothing else in the program knows what F predicts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ldm.errors import UserError


class Coefficients(NamedTuple):
    """One scalar per sample."""

    c_skip: Tensor  # (B,)
    c_out: Tensor  # (B,)
    c_in: Tensor  # (B,)
    c_noise: Tensor  # (B,) what the backbone sees of σ


def log_sigma(sigma: Tensor) -> Tensor:
    """log(σ)/4, the noise label of EDM (Karras et al. 2022, table 1). Any shape."""
    return sigma.log() / 4


class Parameterization(ABC):
    """float32 is accurate for σ in [1e-4, 1e4]; no formula below subtracts nearly equal numbers."""

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """sigma: (B,) float32 or float64, positive. Returns four (B,) of the same dtype."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,) -> (B,): 1/c_out², which turns |D − x0|² into the mean squared error on F."""
        return self.coefficients(sigma).c_out ** -2


@dataclass(frozen=True)
class Eps(Parameterization):
    """F predicts the noise (Ho et al. 2020). Weights trained on VP indices want `noise_label=ScaledLinear().index`."""

    noise_label: Callable[[Tensor], Tensor] = log_sigma

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(sigma.new_ones(sigma.shape), -sigma, (1 + sigma**2).rsqrt(), self.noise_label(sigma))


@dataclass(frozen=True)
class V(Parameterization):
    """F predicts α·noise − σ_vp·x0, (α, σ_vp) = (1, σ)/√(1+σ²) (Salimans & Ho 2022, appendix D)."""

    noise_label: Callable[[Tensor], Tensor] = log_sigma

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_in = (1 + sigma**2).rsqrt()
        return Coefficients(c_in**2, -sigma * c_in, c_in, self.noise_label(sigma))


@dataclass(frozen=True)
class X0(Parameterization):
    """F predicts the clean latent."""

    noise_label: Callable[[Tensor], Tensor] = log_sigma

    def coefficients(self, sigma: Tensor) -> Coefficients:
        one = sigma.new_ones(sigma.shape)
        return Coefficients(0 * one, one, (1 + sigma**2).rsqrt(), self.noise_label(sigma))


@dataclass(frozen=True)
class Flow(Parameterization):
    """F predicts noise − x0, the velocity of (1−t)·x0 + t·noise at t = σ/(1+σ) (rectified flow; Esser et al. 2024)."""

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_in = 1 / (1 + sigma)
        t = sigma * c_in
        return Coefficients(c_in, -t, c_in, t)


@dataclass(frozen=True)
class EDM(Parameterization):
    """F's input and target have unit variance if x0 has standard deviation `sigma_data` (Karras et al. 2022, table 1).

    Raises UserError unless sigma_data is finite and positive.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise UserError(f"EDM: sigma_data is {self.sigma_data}; give the latents' standard deviation, a number > 0")

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return Coefficients((self.sigma_data * c_in) ** 2, sigma * self.sigma_data * c_in, c_in, log_sigma(sigma))
