"""How latents are sampled: solver, schedule, guidance and number of steps, in one object."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.noise import BrownianPath
from ldm.diffusion.schedules import Schedule, Spacing, grid, linspace
from ldm.diffusion.solvers import Callback, Solver
from ldm.keyed_random import KeyedRandom


@dataclass(frozen=True)
class Sampling:
    """From noise to latents. Raises UserError, when it is built, for steps that the schedule and spacing do not have."""

    solver: Solver
    schedule: Schedule
    guidance: Guidance
    steps: int
    spacing: Spacing = linspace

    def __post_init__(self) -> None:
        self.sigmas()  # a bad setting fails now, not at the first image

    def sigmas(self) -> Tensor:
        """(steps + 1,) float32 on the CPU, falling to 0."""
        return grid(self.schedule, self.steps, self.spacing)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        cond: Conditioning,
        null: Conditioning,
        random: KeyedRandom,
        shape: Sequence[int],
        callback: Callback | None = None,
    ) -> Tensor:
        """cond: B rows; null: 1 or B rows; shape: (C, H, W) of a latent. Returns z, (B, C, H, W) float32.

        random: (B,) samples: the starting noise, and a stochastic solver's, are functions of (seed, index) alone.
        callback: called with (i, x0_hat) in step i, for a progress bar.
        """
        sigmas = self.sigmas()
        x = random.normal("sampling", shape) * sigmas[0]
        cond, null = denoiser.prepared(cond), denoiser.prepared(null)
        return self.solver(self.guidance(denoiser, cond, null), x, sigmas, BrownianPath(random, shape), callback)
