"""How latents are sampled: solver, schedule, guidance and number of steps, in one object."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.schedules import Schedule, grid
from ldm.diffusion.solvers import Solver


@dataclass(frozen=True)
class Sampling:
    """From unit noise to latents. Raises UserError if steps < 1, when it is built."""

    solver: Solver
    schedule: Schedule
    guidance: Guidance
    steps: int

    def __post_init__(self) -> None:
        grid(self.schedule, self.steps)  # a bad setting fails now, not at the first image

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning, noise: Tensor) -> Tensor:
        """cond: B rows; null: 1 or B rows; noise: (B, C, H, W), standard normal. Returns z, (B, C, H, W) float32."""
        sigmas = grid(self.schedule, self.steps)
        return self.solver(self.guidance(denoiser, cond, null), noise.float() * sigmas[0], sigmas)
