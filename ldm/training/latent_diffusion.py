"""Stage two: the conditional latent diffusion model (Rombach et al. 2022)."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.batch import Batch
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import LEVELS, DenoisingLoss
from ldm.diffusion.parameterization import Parameterization
from ldm.diffusion.sampling import Sampling
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.training.base import OptimizerFactory, TrainingModule
from ldm.training.caching import refuse_other_networks


class LatentDiffusionModule(TrainingModule):
    """Trains a denoiser on the first stage's latents, conditioned on captions that are dropped now and then.

    Args:
        first_stage: frozen; `.latents(batch, random)`, `.decode(z)`.
        conditioner: `(batch) -> Conditioning`, `.null(n)`; trained too where its parameters require grad.
        backbone: (x_in, c_noise, cond) -> F.
        parameterization: what the backbone predicts.
        loss: (denoiser, z, cond, random) -> (loss (B,), sigma (B,)).
        caption_dropout: probability in [0, 1] that a sample trains with the null conditioning, which classifier-free
            guidance needs (Ho & Salimans 2022).
        optimizer, lr_schedule, seed: see TrainingModule.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        conditioner: nn.Module,
        backbone: nn.Module,
        parameterization: Parameterization,
        loss: DenoisingLoss,
        caption_dropout: float,
        optimizer: OptimizerFactory,
        lr_schedule: Callable[[int], float],
        seed: int,
    ) -> None:
        super().__init__(optimizer, lr_schedule, seed)
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"model.caption_dropout is {caption_dropout}; it is a probability: give a number in [0, 1]")
        self.first_stage, self.conditioner = first_stage, conditioner
        self.denoiser = Denoiser(backbone, parameterization)
        self.loss, self.caption_dropout = loss, caption_dropout

    def setup(self, stage: str) -> None:
        """Refuses a latent cache of other networks before the first step."""
        stamp = getattr(self.trainer.datamodule, "stamp", None)
        if stamp is not None:
            refuse_other_networks(stamp, self.first_stage, getattr(self.conditioner, "encoder", None))

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        """loss: the mean; losses and sigma: (B,), each sample's, for callbacks."""
        random = KeyedRandom(self.seed, batch["index"])
        z = self.first_stage.latents(batch, random)
        cond = self.drop(self.conditioner(batch, self.first_stage.latents), random)
        losses, sigma = self.loss(self.denoiser, z, cond, random)
        loss = losses.mean()
        self.log("train/loss", self.shared(loss), prog_bar=True)
        return {"loss": loss, "losses": losses.detach(), "sigma": sigma}

    def drop(self, cond: Conditioning, random: KeyedRandom) -> Conditioning:
        """Caption dropout: on embeddings, so that live and cached text share it. Several encoders may drop out apart."""
        null = self.conditioner.null(len(cond.mask), cond)
        cond = self.conditioner.drop_parts(cond, null, random)
        return cond.where(random.uniform("caption_dropout") >= self.caption_dropout, null)

    def validation_step(self, batch: Batch, _: int) -> None:
        values = self.named(self.validation_losses(batch))
        # a float: Lightning averages whole counts over ranks and cuts the result
        self.log_dict(values, batch_size=float(len(batch["index"])), sync_dist=True)

    def validation_losses(self, batch: Batch) -> Tensor:
        """(LEVELS,): the loss at fixed noise levels, with noise that belongs to the sample: comparable over steps and runs."""
        random = KeyedRandom(self.seed, batch["index"])
        z = self.first_stage.latents(batch, random)
        cond = self.conditioner(batch, self.first_stage.latents)
        levels = [self.loss.at_level(self.denoiser, z, cond, random, level)[0].mean() for level in range(LEVELS)]
        return torch.stack(levels)

    @staticmethod
    def named(losses: Tensor, prefix: str = "val") -> dict[str, Tensor]:
        """What validation_losses gives, as it is logged."""
        levels = {f"{prefix}/loss_level_{level}": loss for level, loss in enumerate(losses)}
        return levels | {f"{prefix}/loss": losses.mean()}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """(B, 3, H, W): images[index] (uint8) through the first stage and back: the best that sampling could do."""
        batch = Batch(image=images[index.cpu()].to(self.device))
        latents = self.first_stage.latents(batch, KeyedRandom(self.seed, index.to(self.device)))
        return self.first_stage.decode(latents)

    @torch.no_grad()
    def sample(
        self, sampling: Sampling, captions: list[str], index: Tensor, side: int, seed: int, negative: str = ""
    ) -> Tensor:
        """Pictures for captions: (B, 3, side, side) in about [-1, 1].

        index: (B,) int64; the starting noise of a picture is a function of (seed, its index) alone.
        negative: a prompt that guidance leads away from, in place of the null conditioning.
        """
        batch = Batch(caption=captions, index=index.to(self.device))
        cond = self.conditioner(batch, self.first_stage.latents)
        null = self.conditioner.null(len(captions), cond)
        if negative:
            null = self.conditioner({**batch, "caption": [negative] * len(captions)}, self.first_stage.latents)
        return self._draw(sampling, cond, null, index, self.first_stage.latent_shape(side), seed)

    @torch.no_grad()
    def sample_as(self, batch: Batch, sampling: Sampling, seed: int) -> Tensor:
        """The same for the captions, encoded or not, and in the shape of a batch."""
        cond = self.conditioner(batch, self.first_stage.latents)
        null = self.conditioner.null(len(batch["index"]), cond)
        return self._draw(sampling, cond, null, batch["index"], self.first_stage.shape_of(batch), seed)

    def _draw(
        self,
        sampling: Sampling,
        cond: Conditioning,
        null: Conditioning,
        index: Tensor,
        shape: tuple[int, int, int],
        seed: int,
    ) -> Tensor:
        random = KeyedRandom(seed, index.to(self.device))
        apart = getattr(getattr(self.conditioner, "encoder", None), "dropout", [])  # of several text encoders (SD3)
        if self.caption_dropout == 0 and not apart and sampling.guidance.scale != 1:
            warnings.warn(
                "this run trained without caption dropout, so guidance leads away from a null that it never saw: train with "
                "model.caption_dropout=0.1, or sample with sampling.guidance.scale=1",
                stacklevel=2,
            )
        return self.first_stage.decode(sampling(self.denoiser, cond, null, random, shape))
