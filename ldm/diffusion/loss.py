"""The denoising loss: draw σ and noise for each sample, weigh the squared error of x0_hat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.weighting import Weighting
from ldm.keyed_random import KeyedRandom

LEVELS = 8  # noise levels of the validation loss


@dataclass(frozen=True)
class DenoisingLoss:
    """weighting(σ)·|D(z + σ·noise; σ, cond) − z|², the mean over C, H and W (Karras et al. 2022, equations 2 and 8).

    Args:
        schedule: maps uniform t to σ, so it is the training distribution of σ.
        weighting: weight of the squared error at σ.
    """

    schedule: Schedule
    weighting: Weighting

    def __call__(self, denoiser: Denoiser, z: Tensor, cond: Conditioning, random: KeyedRandom) -> tuple[Tensor, Tensor]:
        """z: (B, C, H, W) scaled latents, on the device of `random`. Returns the loss (B,) and σ (B,), float32."""
        sigma = self.schedule(random.uniform("t")).float()
        return self._loss(denoiser, z, cond, sigma, random.normal("noise", z.shape[1:])), sigma

    def at_level(
        self, denoiser: Denoiser, z: Tensor, cond: Conditioning, random: KeyedRandom, level: int
    ) -> tuple[Tensor, Tensor]:
        """The same at the fixed σ = schedule((level + ½)/LEVELS), level in 0..LEVELS−1, for validation.

        The levels are equal slices of the training distribution, so their mean estimates the training loss. Noise is
        keyed by sample and level, so every checkpoint sees the same.
        """
        assert 0 <= level < LEVELS, f"level {level} is not in 0..{LEVELS - 1}"
        t = torch.full((len(z),), (level + 0.5) / LEVELS, dtype=torch.float64, device=z.device)
        sigma = self.schedule(t).float()
        return self._loss(denoiser, z, cond, sigma, random.normal(f"validation noise {level}", z.shape[1:])), sigma

    def _loss(self, denoiser: Denoiser, z: Tensor, cond: Conditioning, sigma: Tensor, noise: Tensor) -> Tensor:
        x0_hat = denoiser(z + sigma.view(-1, 1, 1, 1) * noise, sigma, cond)
        return self.weighting(sigma) * (x0_hat - z).square().mean(dim=(1, 2, 3))
