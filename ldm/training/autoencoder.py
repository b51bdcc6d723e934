"""Stage one: the KL-regularized autoencoder."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.batch import Batch, to_unit
from ldm.keyed_random import KeyedRandom
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.base import OptimizerFactory, TrainingModule


class AutoencoderModule(TrainingModule):
    """Trains an autoencoder, and measures the latents' statistics that stage two normalizes by.

    Args:
        autoencoder: the network.
        distance: (reconstruction, image) -> elementwise distance, for instance |a - b|.
        kl_weight: weight of the posterior's KL divergence in nats, beside the distance summed over an image's elements
            (Rombach et al. 2022 use 1e-6).
        optimizer, lr_schedule, seed: see TrainingModule.

    The checkpoint's `latent_mean` and `latent_std` (z,) are those of posterior samples over the last validation, under
    the weights that validation used (EMA's).
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        distance: Callable[[Tensor, Tensor], Tensor],
        kl_weight: float,
        optimizer: OptimizerFactory,
        lr_schedule: Callable[[int], float],
        seed: int,
    ) -> None:
        super().__init__(optimizer, lr_schedule, seed)
        self.autoencoder, self.distance, self.kl_weight = autoencoder, distance, kl_weight
        self.register_buffer("latent_mean", torch.full((autoencoder.latent_channels,), torch.nan))
        self.register_buffer("latent_std", torch.full((autoencoder.latent_channels,), torch.nan))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        noise = KeyedRandom(self.seed, batch["index"]).normal("posterior", posterior.mean.shape[1:])
        reconstruction = self.autoencoder.decode(posterior.sample(noise))
        distance = self.distance(reconstruction, images).mean()
        kl = posterior.kl().mean()
        self.log_dict({"train/distance": distance, "train/kl": kl}, prog_bar=True)
        return distance + self.kl_weight / images[0].numel() * kl

    def on_validation_epoch_start(self) -> None:
        self._moments = torch.zeros(3, self.autoencoder.latent_channels, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, _: int) -> None:
        images = to_unit(batch["image"])
        posterior = self.autoencoder.encode(images)
        reconstruction = self.autoencoder.decode(posterior.mean).clamp(-1, 1)
        psnr = peak_signal_noise_ratio(reconstruction, images, data_range=2.0, dim=(1, 2, 3))  # mean over images, dB
        values = {
            "val/psnr": psnr,
            "val/kl": posterior.kl().mean(),
            "val/distance": self.distance(reconstruction, images).mean(),
        }
        self.log_dict(values, batch_size=len(images), sync_dist=True)
        mean, square = posterior.mean.double(), posterior.mean.double().square() + posterior.logvar.double().exp()
        self._moments += torch.stack([torch.ones_like(mean), mean, square]).sum(dim=(1, 3, 4))

    def on_validation_epoch_end(self) -> None:
        count, total, square = self.trainer.strategy.reduce(self._moments, reduce_op="sum")
        mean = total / count
        self.latent_mean.copy_(mean)
        self.latent_std.copy_((square / count - mean.square()).sqrt())

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) in about [-1, 1], from the posterior's mean."""
        return self.autoencoder.decode(self.autoencoder.encode(to_unit(batch["image"])).mean)
