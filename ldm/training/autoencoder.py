"""Stage one: the autoencoder, KL-regularized or vector-quantized, with or without an adversary."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.batch import Batch, to_unit
from ldm.keyed_random import KeyedRandom
from ldm.models.autoencoder import Autoencoder
from ldm.training.adversarial import Adversary
from ldm.training.base import OptimizerFactory, TrainingModule
from ldm.training.reconstruction_loss import ReconstructionLoss


class AutoencoderModule(TrainingModule):
    """Trains an autoencoder, and measures the latents' statistics that stage two normalizes by.

    Args:
        autoencoder: the network.
        loss: of reconstructions.
        penalty_weight: of the autoencoder's penalty beside a distance summed over a picture's elements: the posterior's KL
            divergence in nats (Rombach et al. 2022 use 1e-6), or the codebook's loss (1).
        optimizer, lr_schedule, seed: see TrainingModule.
        adversary: a discriminator and its weight; None: none.

    The checkpoint's `latent_mean` and `latent_std` (z,) are those of posterior samples over the last validation, under
    the weights that validation used (EMA's); `measured` is what that validation found.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        loss: ReconstructionLoss,
        penalty_weight: float,
        optimizer: OptimizerFactory,
        lr_schedule: Callable[[int], float],
        seed: int,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__(optimizer, lr_schedule, seed)
        self.autoencoder, self.loss, self.adversary = autoencoder, loss, adversary
        self.penalty_weight = penalty_weight
        self.register_buffer("latent_mean", torch.full((autoencoder.latent_channels,), torch.nan))
        self.register_buffer("latent_std", torch.full((autoencoder.latent_channels,), torch.nan))
        self.measured: dict[str, float] = {}

    def training_step(self, batch: Batch, _: int) -> Tensor:
        images = to_unit(batch["image"])
        coded = self.autoencoder.code(images, KeyedRandom(self.seed, batch["index"]))
        reconstruction = self.autoencoder.decode_coded(coded.latents)
        parts = self.loss(reconstruction, images)
        penalty = coded.penalty.mean()
        logs = {"train/distance": parts.distance, f"train/{coded.name}": penalty}
        self.log_dict({name: self.shared(value) for name, value in logs.items()}, prog_bar=True)
        if parts.perceptual is not None:
            self.log("train/perceptual", self.shared(parts.perceptual))
        loss = parts.loss + self.penalty_weight / images[0].numel() * penalty
        if self.adversary is not None:
            last = self.autoencoder.decoder.conv_out.weight
            terms = self.adversary(images, reconstruction, parts.loss, last, self.global_step)
            self.log_dict({name: self.shared(value) for name, value in terms.logs.items()})
            loss = loss + terms.generator + terms.discriminator
        return loss

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        """The adversary's gradient does not count against the autoencoder's."""
        theirs = {*self.adversary.parameters()} if self.adversary is not None else set()
        parts = [[p for p in self.parameters() if p.requires_grad and (p in theirs) == flag] for flag in (False, True)]
        return [part for part in parts if part]

    def on_validation_epoch_start(self) -> None:
        self._moments = torch.zeros(3, self.autoencoder.latent_channels, dtype=torch.float64, device=self.device)
        self._counted: Tensor | float = 0.0

    def validation_step(self, batch: Batch, _: int) -> None:
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        reconstruction = self.autoencoder.decode(posterior.mean).clamp(-1, 1)
        psnr = peak_signal_noise_ratio(reconstruction, images, data_range=2.0, dim=(1, 2, 3))  # mean over images, dB
        values = {"val/psnr": psnr, "val/distance": self.loss.distance(reconstruction, images).mean()}
        self.log_dict(values, batch_size=float(len(images)), sync_dist=True)  # a float: see LatentDiffusionModule
        self._counted = self._counted + self.autoencoder.count(posterior)
        mean, square = posterior.mean.double(), posterior.mean.double().square() + posterior.logvar.double().exp()
        self._moments += torch.stack([torch.ones_like(mean), mean, square]).sum(dim=(1, 3, 4))

    def on_validation_epoch_end(self) -> None:
        reduce = self.trainer.strategy.reduce
        measures = self.autoencoder.measures(reduce(self._counted, reduce_op="sum"))
        self.log_dict({f"val/{name}": value for name, value in measures.items()})
        count, total, square = reduce(self._moments, reduce_op="sum")
        mean = total / count
        self.latent_mean.copy_(mean)
        self.latent_std.copy_((square / count - mean.square()).sqrt())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        metrics = self.trainer.callback_metrics.items()
        found = {name.removeprefix("val/"): float(value) for name, value in metrics if name.startswith("val/")}
        checkpoint["measured"] = found or self.measured

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.measured = checkpoint.get("measured", {})

    @torch.no_grad()
    def reconstruct(self, images: Tensor, captions: list[str], index: Tensor) -> Tensor:
        """(B, 3, H, W) in about [-1, 1]: images[index] (uint8), from the posterior's mean."""
        chosen = to_unit(images[index.cpu()].to(self.device))
        return self.autoencoder.decode(self.autoencoder.encode(chosen).mean)
