"""Noise schedules: t in [0, 1] -> σ, rising in t.

Training draws t uniformly, so a schedule is also a distribution of σ; sampling walks down `grid(schedule, steps, spacing)`.

Every schedule takes a floating tensor of any shape and returns float64 of that shape on the same device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ldm.errors import UserError

Schedule = Callable[[Tensor], Tensor]  # t -> σ
Spacing = Callable[[int], Tensor]  # steps -> t, (steps,) float64, falling from about 1


def linspace(steps: int) -> Tensor:
    """Equally spaced t from 1 down to 0, both ends among them."""
    return torch.linspace(1, 0, steps, dtype=torch.float64)


@dataclass(frozen=True)
class Leading:
    """t of the VP indices offset, offset + k, offset + 2k, ..., k = timesteps // steps: DDIM's and Stable Diffusion's.

    It never sees pure noise (Lin et al. 2024, table 2). Raises UserError, when it is called, if an index is off the table.
    """

    timesteps: int = 1000
    offset: int = 1

    def __call__(self, steps: int) -> Tensor:
        index = torch.arange(steps).flip(0) * (self.timesteps // steps) + self.offset
        if steps > self.timesteps or index.min() < 0 or index.max() >= self.timesteps:
            raise UserError(f"{self}: {steps} steps need index {index.max()}; give fewer steps, or offset=0")
        return index.double() / (self.timesteps - 1)


@dataclass(frozen=True)
class Trailing:
    """t of every (timesteps / steps)-th VP index, counted down from the last one (Lin et al. 2024, table 2).

    Raises UserError, when it is called, if there are more steps than timesteps.
    """

    timesteps: int = 1000

    def __call__(self, steps: int) -> Tensor:
        if steps > self.timesteps:
            raise UserError(f"{self}: {steps} steps; give at most {self.timesteps}")
        index = (self.timesteps - torch.arange(steps).double() * self.timesteps / steps).round() - 1
        return index / (self.timesteps - 1)


def grid(schedule: Schedule, steps: int, spacing: Spacing = linspace) -> Tensor:
    """(steps + 1,) float32 on the CPU: σ at the spacing's t, falling, then σ = 0.

    Raises UserError if steps < 1.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}; sampling needs at least 1 step")
    sigmas = schedule(spacing(steps)).float()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@lru_cache(maxsize=16)
def _log_sigmas(beta_start: float, beta_end: float, timesteps: int, power: int, device: torch.device) -> Tensor:
    """Of the VP chain whose β^(1/power) is linear in the index. (timesteps,) float64."""
    with torch.inference_mode(False):  # the cached table also serves training
        betas = torch.linspace(
            beta_start ** (1 / power), beta_end ** (1 / power), timesteps, dtype=torch.float64, device="cpu"
        )
        alphas_cumprod = (1 - betas**power).cumprod(0)
        return (((1 - alphas_cumprod) / alphas_cumprod).log() / 2).to(device)


@dataclass(frozen=True)
class Linear:
    """DDPM's: β is linear in the VP index (Ho et al. 2020, section 4; CompVis calls it "sqrt_linear").

    Between the `timesteps` levels log σ is linear in the index; t = 0 is index 0, t = 1 is index timesteps − 1.
    Raises UserError unless 0 < beta_start < beta_end < 1 and timesteps >= 2.
    """

    beta_start: float = 0.0001
    beta_end: float = 0.02
    timesteps: int = 1000
    power: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (0 < self.beta_start < self.beta_end < 1 and self.timesteps >= 2):
            raise UserError(f"{self}: give 0 < beta_start < beta_end < 1 and timesteps >= 2")

    def __call__(self, t: Tensor) -> Tensor:
        table = self._table(t.device)
        index = t.double() * (self.timesteps - 1)
        low = index.long().clamp(0, self.timesteps - 2)
        return torch.lerp(table[low], table[low + 1], index - low).exp()

    def index(self, sigma: Tensor) -> Tensor:
        """The inverse: σ -> fractional VP index in [0, timesteps − 1], same shape and dtype; clamped off the table.

        The `noise_label` of backbones trained on discrete timesteps.
        """
        table = self._table(sigma.device)
        log_sigma = sigma.double().log()
        low = torch.searchsorted(table, log_sigma, right=True).clamp(1, self.timesteps - 1) - 1
        index = low + (log_sigma - table[low]) / (table[low + 1] - table[low])
        return index.clamp(0, self.timesteps - 1).to(sigma.dtype)

    def _table(self, device: torch.device) -> Tensor:
        return _log_sigmas(self.beta_start, self.beta_end, self.timesteps, self.power, device)


@dataclass(frozen=True)
class ScaledLinear(Linear):
    """Stable Diffusion's (CompVis "linear", diffusers "scaled_linear"): √β is linear in the VP index, σ_max is 14.6146."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    power: ClassVar[int] = 2


@dataclass(frozen=True)
class ZeroTerminalSNR:
    """A schedule stretched until its last level is pure noise, that is sigma_max (Lin et al. 2024, algorithm 1).

    √ᾱ = 1/√(1+σ²) is shifted and scaled so that it is 0 at t = 1 and as it was at t = 0. For V, X0 and Flow: from pure
    noise the predicted noise says nothing of x0. Raises UserError unless sigma_max is above the schedule's own.
    """

    schedule: Linear
    sigma_max: float = 4096.0

    def __post_init__(self) -> None:
        if not self._ends()[1] < self.sigma_max < math.inf:
            raise UserError(f"{self}: give a finite sigma_max above the schedule's own, {self._ends()[1]:g}")

    def __call__(self, t: Tensor) -> Tensor:
        first, last = (_alpha(torch.tensor(end, dtype=torch.float64)) for end in self._ends())
        alpha = (_alpha(self.schedule(t)) - last) * first / (first - last)
        return (alpha.clamp(min=0) ** -2 - 1).sqrt().clamp(max=self.sigma_max)

    def index(self, sigma: Tensor) -> Tensor:
        """The inverse, as the schedule's own `index`."""
        first, last = (_alpha(torch.tensor(end, dtype=torch.float64)) for end in self._ends())
        alpha = torch.where(sigma >= self.sigma_max, 0.0, _alpha(sigma.double()))
        alpha = alpha * (first - last) / first + last
        return self.schedule.index((alpha**-2 - 1).sqrt()).to(sigma.dtype)

    def _ends(self) -> list[float]:
        return self.schedule(torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")).tolist()


def _alpha(sigma: Tensor) -> Tensor:
    return (1 + sigma**2).rsqrt()


@dataclass(frozen=True)
class Shifted:
    """shift·σ: more noise for larger pictures, whose pixels are more alike.

    SD3's shift of flow time (Esser et al. 2024, equation 23), and the cosine schedule's (Hoogeboom et al. 2023, equation 8)
    with shift = side/64. Raises UserError unless shift > 0.
    """

    schedule: Schedule
    shift: float

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise UserError(f"{self}: give shift > 0")

    def __call__(self, t: Tensor) -> Tensor:
        return self.shift * self.schedule(t)


@dataclass(frozen=True)
class Exponential:
    """log σ is linear in t. Raises UserError unless 0 < sigma_min < sigma_max, both finite."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(f"{self}: give 0 < sigma_min < sigma_max")

    def __call__(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t.double()


@dataclass(frozen=True)
class Explicit:
    """Levels given one by one, log σ linear between them, as "Align your steps" (Sabour et al. 2024) has for other counts.

    sigmas: falling, at least 2, the last above 0. With as many steps as levels the grid is these and then 0.
    Raises UserError for others.
    """

    sigmas: Sequence[float]

    def __post_init__(self) -> None:
        s = list(self.sigmas)
        if len(s) < 2 or not all(a > b for a, b in pairwise(s)) or not 0 < s[-1] <= s[0] < math.inf:
            raise UserError(f"sigmas are {s}; give at least 2 falling noise levels, the last above 0")

    def __call__(self, t: Tensor) -> Tensor:
        table = torch.tensor(list(self.sigmas)[::-1], dtype=torch.float64, device=t.device).log()
        place = t.double() * (len(table) - 1)
        low = place.long().clamp(0, len(table) - 2)
        return torch.lerp(table[low], table[low + 1], place - low).exp()


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
    """Uniform flow time: σ = τ/(1−τ) with τ from t_min to t_max.

    The defaults end at σ_max = 999; τ = 1 is pure noise, where σ is infinite.
    Raises UserError unless 0 < t_min < t_max < 1.
    """

    t_min: float = 0.001
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max < 1:
            raise UserError(f"{self}: give 0 < t_min < t_max < 1")

    def __call__(self, t: Tensor) -> Tensor:
        tau = self.t_min + (self.t_max - self.t_min) * self._flow_time(t.double())
        return tau / (1 - tau)

    def _flow_time(self, t: Tensor) -> Tensor:
        return t


@dataclass(frozen=True)
class Mode(RectifiedFlow):
    """SD3's mode sampling: flow times near the middle (scale > 0) or the ends (scale < 0) are more likely.

    Esser et al. 2024, equation 20, whose u is 1 − t here. Raises UserError unless −1 <= scale <= 2/(π−2).
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"{self}: give scale in [-1, {2 / (math.pi - 2):.3f}], where flow time rises in t")

    def _flow_time(self, t: Tensor) -> Tensor:
        return t - self.scale * ((math.pi / 2 * (1 - t)).cos() ** 2 - t)


@dataclass(frozen=True)
class Cosine:
    """σ = tan(π/2·t), squeezed so that log SNR = −2·log σ runs from logsnr_max to logsnr_min; SD3's CosMap too.

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
