"""The adversarial term of the autoencoder's loss (Esser et al. 2021, section 3.1), as the published first stages use it."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.errors import UserError


class Hinge:
    """Lim & Ye 2017. Logits of any shape -> scalar."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


class BCE:
    """Binary cross-entropy, non-saturating for the generator (Goodfellow et al. 2014)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake).mean()


class Terms(NamedTuple):
    """generator: to add to the reconstruction loss; discriminator: the discriminator's own; logs: by name."""

    generator: Tensor
    discriminator: Tensor
    logs: dict[str, Tensor]


class Adversary(nn.Module):
    """A discriminator, its loss, and how much the autoencoder listens to it.

    Both losses are of one forward pass and one backward pass: the generator's term sees the discriminator's weights detached,
    and the discriminator sees the reconstruction detached, so neither reaches the other's weights. One optimizer steps both,
    which leaves accumulation, DDP, precision and the count of steps to Lightning as they are.

    Args:
        discriminator: pictures (B, 3, H, W) in [-1, 1] -> logits.
        loss: Hinge or BCE.
        weight: of the generator's term; 0.5 in Stable Diffusion's first stage.
        start: the step from which both losses count.
        adaptive: scale the term so that it moves the decoder's last layer as much as the reconstruction does (eq. 7).
        per_image: take that reconstruction loss as summed over a picture's elements, as published for KL models; else averaged
            (VQ models). It decides where `limit` cuts.
        limit: of the adaptive scale.
        r1: weight of the gradient penalty on real pictures (Mescheder et al. 2018), 0 for none.

    Raises:
        UserError: a negative number.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        loss: Hinge | BCE,
        weight: float = 0.5,
        start: int = 50_001,
        adaptive: bool = True,
        per_image: bool = True,
        limit: float = 1e4,
        r1: float = 0.0,
    ) -> None:
        super().__init__()
        if min(weight, start, r1) < 0 or limit <= 0:
            raise UserError(f"adversary: weight={weight}, start={start}, limit={limit}, r1={r1}; none may be negative")
        self.discriminator, self.loss = discriminator, loss
        self.weight, self.start, self.adaptive = weight, start, adaptive
        self.per_image, self.limit, self.r1 = per_image, limit, r1

    def forward(self, real: Tensor, fake: Tensor, reconstruction_loss: Tensor, last_layer: Tensor, step: int) -> Terms:
        """The terms of one batch.

        Args:
            real, fake: pictures and their reconstructions, (B, 3, H, W).
            reconstruction_loss: scalar, averaged over elements.
            last_layer: the decoder's last weight, by which the terms are balanced.
            step: of the optimizer.
        """
        if step < self.start:
            # zero, and yet with a gradient: DDP waits for one from every weight
            silent: Any = sum(p.sum() for p in self.discriminator.parameters()) * 0.0
            return Terms(torch.zeros((), device=real.device), silent, {})
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        generator = self.loss.generator(functional_call(self.discriminator, frozen, (fake,)))
        scale = self._scale(reconstruction_loss, generator, last_layer, fake[0].numel()) if self.adaptive else 1.0
        penalized = self.r1 > 0
        real = real.detach().requires_grad_(penalized)
        real_logits, fake_logits = self.discriminator(real), self.discriminator(fake.detach())
        discriminator = self.loss.discriminator(real_logits, fake_logits)
        logs = {
            "train/discriminator": discriminator.detach(),
            "train/generator": generator.detach(),
            "train/adversary_scale": torch.as_tensor(scale, device=real.device),
            "train/logits_real": real_logits.detach().mean(),
            "train/logits_fake": fake_logits.detach().mean(),
        }
        if penalized:
            (slope,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
            penalty = slope.square().sum(dim=(1, 2, 3)).mean()
            discriminator = discriminator + 0.5 * self.r1 * penalty
            logs["train/r1"] = penalty.detach()
        return Terms(self.weight * scale * generator, discriminator, logs)

    def _scale(self, reconstruction_loss: Tensor, generator: Tensor, last_layer: Tensor, elements: int) -> Tensor:
        """Ratio of the two gradients' norms at the last layer, both averaged over ranks: one number for the global batch."""
        slopes = [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
            for loss in (reconstruction_loss, generator)
        ]
        if dist.is_initialized():
            for slope in slopes:
                dist.all_reduce(slope)
                slope /= dist.get_world_size()
        size = elements if self.per_image else 1
        return (size * slopes[0].norm() / (slopes[1].norm() + 1e-4)).clamp(max=self.limit) / size
