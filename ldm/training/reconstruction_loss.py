"""The autoencoder's reconstruction loss: a distance of pixels, a perceptual one, and the noise level they are divided by."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Reconstruction(NamedTuple):
    """loss: scalar, averaged over a picture's elements; distance, perceptual: what it is made of, averaged."""

    loss: Tensor
    distance: Tensor
    perceptual: Tensor | None


class ReconstructionLoss(nn.Module):
    """(distance + weight perceptual) / exp(logvar) + logvar: the negative log-likelihood of Rombach et al.'s first stages.

    Args:
        distance: (reconstruction, image) -> elementwise distance; |a - b| as published.
        perceptual: (reconstruction, image) -> (B,), see models/perceptual.py; None: pixels alone.
        perceptual_weight: 1 as published.
        learn_logvar: let the scale be learned (from 0), as sgm's; the published models keep it at 0.
    """

    def __init__(
        self,
        distance: Callable[[Tensor, Tensor], Tensor],
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        self.distance, self.perceptual, self.perceptual_weight = distance, perceptual, perceptual_weight
        self.logvar = nn.Parameter(torch.zeros(())) if learn_logvar else None

    def forward(self, reconstruction: Tensor, images: Tensor) -> Reconstruction:
        """Both (B, 3, H, W) in about [-1, 1]."""
        distance = self.distance(reconstruction, images).mean()
        loss, perceptual = distance, None
        if self.perceptual is not None:
            perceptual = self.perceptual(reconstruction, images).mean()
            loss = loss + self.perceptual_weight * perceptual
        if self.logvar is not None:
            loss = loss / self.logvar.exp() + self.logvar
        return Reconstruction(loss, distance, perceptual)
