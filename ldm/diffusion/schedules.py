"""Noise schedules: t in [0, 1] -> σ, rising in t.

Training draws t uniformly, so a schedule is also a distribution of σ; sampling walks down `grid(schedule, steps)`.

Every schedule takes a floating tensor of any shape and returns float64 of that shape on the same device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ldm.errors import UserError

Schedule = Callable[[Tensor], Tensor]


def grid(schedule: Schedule, steps: int) -> Tensor:
    """(steps + 1,) float32 on the CPU: σ at `steps` equally spaced t from 1 down to 0, then σ = 0.

    Raises UserError if steps < 1.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; sampling needs at least 1 step")
    sigmas = schedule(torch.linspace(1, 0, steps, dtype=torch.float64)).float()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@lru_cache(maxsize=16)
def _scaled_linear_log_sigmas(beta_start: float, beta_end: float, timesteps: int, device: torch.device) -> Tensor:
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    return (((1 - alphas_cumprod) / alphas_cumprod).log() / 2).to(device)


@dataclass(frozen=True)
class ScaledLinear:
    """Stable Diffusion's (CompVis "linear", diffusers "scaled_linear"): √β is linear in the VP index, σ_max is 14.6146.

    Between the `timesteps` levels log σ is linear in the index; t = 0 is index 0, t = 1 is index timesteps − 1.
    Raises UserError unless 0 < beta_start < beta_end < 1 and timesteps >= 2.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.beta_start < self.beta_end < 1 and self.timesteps >= 2):
            raise UserError(f"{self}: give 0 < beta_start < beta_end < 1 and timesteps >= 2")

    def __call__(self, t: Tensor) -> Tensor:
        table = self._log_sigmas(t.device)
        index = t.double() * (self.timesteps - 1)
        low = index.long().clamp(0, self.timesteps - 2)
        return torch.lerp(table[low], table[low + 1], index - low).exp()

    def index(self, sigma: Tensor) -> Tensor:
        """The inverse: σ -> fractional VP index in [0, timesteps − 1], same shape and dtype; clamped off the table.

        The `noise_label` of backbones trained on discrete timesteps.
        """
        table = self._log_sigmas(sigma.device)
        log_sigma = sigma.double().log()
        low = torch.searchsorted(table, log_sigma, right=True).clamp(1, self.timesteps - 1) - 1
        index = low + (log_sigma - table[low]) / (table[low + 1] - table[low])
        return index.clamp(0, self.timesteps - 1).to(sigma.dtype)

    def _log_sigmas(self, device: torch.device) -> Tensor:
        return _scaled_linear_log_sigmas(self.beta_start, self.beta_end, self.timesteps, device)


@dataclass(frozen=True)
class Karras:
    """σ^(1/ρ) is linear in t (Karras et al. 2022, equation 5).

    Raises UserError unless 0 < sigma_min < sigma_max and rho > 0, all finite.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max < math.inf and 0 < self.rho < math.inf):
            raise UserError(f"{self}: give 0 < sigma_min < sigma_max and rho > 0")

    def __call__(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + (high - low) * t.double()) ** self.rho


@dataclass(frozen=True)
class LogNormal:
    """log σ ~ N(mean, std²): σ = exp(mean + std·Φ⁻¹(t)), EDM's training distribution (Karras et al. 2022, table 1).

    SD3's logit-normal flow time is the same family: log σ = logit(t_flow), and its shift multiplies σ. So
    logit-normal(m, s) with a shift is LogNormal(m + log(shift), s); with SD3's shift 3, LogNormal(1.0986, 1)
    (Esser et al. 2024, section 3.1 and equation 23).
    Raises UserError unless mean is finite and std > 0.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise UserError(f"{self}: give a finite mean and std > 0")

    def __call__(self, t: Tensor) -> Tensor:
        eps = torch.finfo(torch.float64).eps  # the ends, at infinity, become about mean ± 8.1·std
        return (self.mean + self.std * torch.special.ndtri(t.double().clamp(eps, 1 - eps))).exp()


@dataclass(frozen=True)
class RectifiedFlow:
    """Uniform flow time: σ = shift·τ/(1−τ) with τ from t_min to t_max (Esser et al. 2024, equation 23 for the shift).

    The defaults end at σ_max = 999·shift; τ = 1 is pure noise, where σ is infinite.
    Raises UserError unless shift > 0 and 0 < t_min < t_max < 1.
    """

    shift: float = 1.0
    t_min: float = 0.001
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not (0 < self.shift < math.inf and 0 < self.t_min < self.t_max < 1):
            raise UserError(f"{self}: give shift > 0 and 0 < t_min < t_max < 1")

    def __call__(self, t: Tensor) -> Tensor:
        tau = self.t_min + (self.t_max - self.t_min) * t.double()
        return self.shift * tau / (1 - tau)


@dataclass(frozen=True)
class Cosine:
    """σ = tan(π/2·t), squeezed so that log SNR = −2·log σ runs from logsnr_max to logsnr_min.

    Nichol & Dhariwal 2021 (equation 17) in the continuous form of Hoogeboom et al. 2023 ("simple diffusion"), which
    needs neither the offset s nor clipped betas. Raises UserError unless logsnr_min < logsnr_max, both finite.
    """

    logsnr_min: float = -15.0
    logsnr_max: float = 15.0

    def __post_init__(self) -> None:
        if not -math.inf < self.logsnr_min < self.logsnr_max < math.inf:
            raise UserError(f"{self}: give finite logsnr_min < logsnr_max")

    def __call__(self, t: Tensor) -> Tensor:
        low, high = math.atan(math.exp(-self.logsnr_max / 2)), math.atan(math.exp(-self.logsnr_min / 2))
        return (low + (high - low) * t.double()).tan()
