"""The denoising loss: draw σ and noise for each sample, weigh the squared error of x0_hat."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.weighting import Weighting
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom

LEVELS = 8  # noise levels of the validation loss


def independent(random: KeyedRandom) -> Tensor:
    """(B,) float64: each sample's t on its own, uniform in (0, 1)."""
    return random.uniform("t")


@dataclass(frozen=True)
class Stratified:
    """One t in each of batch_size equal parts of [0, 1): a loss of less variance (Kingma et al. 2021, appendix I.1).

    batch_size: the global batch: samples batch_size·k, ..., batch_size·(k+1) − 1 share one uniform draw, on any number
    of ranks. Raises UserError if it is below 1.
    """

    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"Stratified: batch_size is {self.batch_size}; give the global batch size")

    def __call__(self, random: KeyedRandom) -> Tensor:
        """(B,) float64 in [0, 1)."""
        batch, place = random.index // self.batch_size, random.index % self.batch_size
        shared = KeyedRandom(random.seed, batch).uniform("stratified t")
        return (shared + place.double() / self.batch_size) % 1


@dataclass(frozen=True)
class DenoisingLoss:
    """weighting(σ)·|D(z + σ·noise; σ, cond) − z|², the mean over C, H and W (Karras et al. 2022, equations 2 and 8).

    Args:
        schedule: maps uniform t to σ, so it is the training distribution of σ.
        weighting: weight of the squared error at σ.
        draw: how a batch's t are drawn.
        offset_noise: standard deviation of noise that is one number per sample and channel, added to the noise, so that a
            picture's mean is learned at high σ too (Guttenberg 2023, "Diffusion with offset noise": 0.1).
        input_perturbation: standard deviation of noise that only the network's input has (Ning et al. 2023: 0.1), which
            makes it robust against its own errors while sampling. The target stays as it was.

    Raises:
        UserError: when one of the two is negative or not finite.
    """

    schedule: Schedule
    weighting: Weighting
    draw: Callable[[KeyedRandom], Tensor] = independent
    offset_noise: float = 0.0
    input_perturbation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("offset_noise", "input_perturbation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"loss.{name} is {getattr(self, name)}; give a number >= 0 (0 is without)")

    def __call__(self, denoiser: Denoiser, z: Tensor, cond: Conditioning, random: KeyedRandom) -> tuple[Tensor, Tensor]:
        """z: (B, C, H, W) scaled latents, on the device of `random`. Returns the loss (B,) and σ (B,), float32."""
        sigma = self.schedule(self.draw(random)).float()
        noise = random.normal("noise", z.shape[1:])
        if self.offset_noise:
            noise = noise + self.offset_noise * random.normal("offset noise", (z.shape[1], 1, 1))
        x = z + _column(sigma) * noise
        target = z
        if self.input_perturbation:
            extra = _column(sigma) * self.input_perturbation * random.normal("input perturbation", z.shape[1:])
            x = x + extra
            # F's target is that of the clean input; D adds c_skip·x to it, so D's target moves by c_skip·extra
            target = z + _column(denoiser.parameterization.coefficients(sigma).c_skip) * extra
        return self._loss(denoiser, x, target, cond, sigma), sigma

    def at_level(
        self, denoiser: Denoiser, z: Tensor, cond: Conditioning, random: KeyedRandom, level: int
    ) -> tuple[Tensor, Tensor]:
        """The same at the fixed σ = schedule((level + ½)/LEVELS), level in 0..LEVELS−1, for validation: plain noise.

        The levels are equal slices of the training distribution, so their mean estimates the training loss. Noise is
        keyed by sample and level, so every checkpoint sees the same.
        """
        assert 0 <= level < LEVELS, f"level {level} is not in 0..{LEVELS - 1}"
        t = torch.full((len(z),), (level + 0.5) / LEVELS, dtype=torch.float64, device=z.device)
        sigma = self.schedule(t).float()
        x = z + _column(sigma) * random.normal(f"validation noise {level}", z.shape[1:])
        return self._loss(denoiser, x, z, cond, sigma), sigma

    def _loss(self, denoiser: Denoiser, x: Tensor, target: Tensor, cond: Conditioning, sigma: Tensor) -> Tensor:
        return self.weighting(sigma) * (denoiser(x, sigma, cond) - target).square().mean(dim=(1, 2, 3))


class Uncertainty(nn.Module):
    """loss/exp(u(σ)) + u(σ) with a learned u, which brings all noise levels to one scale (EDM2: Karras et al. 2024,
    equations 14 and 15 of "Analyzing and improving the training dynamics").

    Validation reports the loss inside, so that it can be compared with runs without.

    Args:
        features: how many random Fourier features of log(σ)/4 u is linear in.
        arguments: of the DenoisingLoss inside.
    """

    def __init__(self, features: int = 128, **arguments: Any) -> None:
        super().__init__()
        self.inner = DenoisingLoss(**arguments)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.randn(features, generator=generator) * 2 * math.pi)
        self.register_buffer("phases", torch.rand(features, generator=generator) * 2 * math.pi)
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, denoiser: Denoiser, z: Tensor, cond: Conditioning, random: KeyedRandom) -> tuple[Tensor, Tensor]:
        loss, sigma = self.inner(denoiser, z, cond, random)
        features = (sigma.log()[:, None] / 4 * self.frequencies + self.phases).cos() * math.sqrt(2 / len(self.phases))
        with torch.autocast(features.device.type, enabled=False):
            u = self.linear(features.float())[:, 0]
        return loss / u.exp() + u, sigma

    def at_level(
        self, denoiser: Denoiser, z: Tensor, cond: Conditioning, random: KeyedRandom, level: int
    ) -> tuple[Tensor, Tensor]:
        return self.inner.at_level(denoiser, z, cond, random, level)


def _column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)
