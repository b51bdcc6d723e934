"""Where diffusion meets pixels: the frozen first stage. One of the two places that look into a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.batch import Batch, to_unit
from ldm.keyed_random import KeyedRandom
from ldm.models.autoencoder import Autoencoder, Posterior


class FirstStage(nn.Module):
    """A frozen autoencoder and its latents' statistics: diffusion works on (z - mean) / std.

    Args:
        autoencoder: trained; it is frozen and put in evaluation mode here.
        mean, std: per latent channel, measured over the training data. std > 0.
    """

    def __init__(self, autoencoder: Autoencoder, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def train(self, mode: bool = True) -> "FirstStage":
        return super().train(False)  # frozen: whatever the trainer says

    @torch.no_grad()
    def latents(self, batch: Batch, random: KeyedRandom) -> Tensor:
        """(B, z, h, w): a sample of the posterior, normalized. The posterior's noise is the sample's own."""
        cached = "moments" in batch
        posterior = Posterior.of(batch["moments"]) if cached else self.autoencoder.encode(to_unit(batch["image"]))
        noise = random.normal("posterior", posterior.mean.shape[1:])
        return (posterior.sample(noise) - self.mean) / self.std

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 2z, h, w) float16: what a latent cache holds, logvar within [-30, 20].

        float16 has eight times the precision of bfloat16; a mean beyond its range becomes infinite.
        """
        return torch.cat(self.autoencoder.encode(to_unit(images)), dim=1).half()

    def encoder_state(self) -> dict[str, Tensor]:
        """The weights that `moments` depends on: all but the decoder's and the latents' statistics."""
        weights = self.autoencoder.state_dict()
        return {name: weight for name, weight in weights.items() if name.startswith(("encoder.", "quant_conv."))}

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """(B, z, h, w) normalized latents -> (B, 3, H, W) images, about in [-1, 1]."""
        # convolutions keep their input's layout, and in this one a CPU decodes a seventh faster
        return self.autoencoder.decode((z * self.std + self.mean).contiguous(memory_format=torch.channels_last))

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        return self.autoencoder.latent_shape(side)

    def shape_of(self, batch: Batch) -> tuple[int, int, int]:
        """The (z, h, w) of a batch's latents."""
        if "moments" in batch:
            return batch["moments"].shape[1] // 2, *batch["moments"].shape[2:]
        return self.latent_shape(batch["image"].shape[-1])


class Pixels(nn.Module):
    """Diffusion in pixel space (DDPM, GLIDE, Imagen): the identity as a first stage."""

    def latents(self, batch: Batch, random: KeyedRandom) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        return to_unit(batch["image"])

    def encoder_state(self) -> dict[str, Tensor]:
        """None: no latent cache is this one's."""
        return {}

    def decode(self, z: Tensor) -> Tensor:
        return z

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        return 3, side, side

    def shape_of(self, batch: Batch) -> tuple[int, int, int]:
        """(3, H, W)."""
        _, channels, height, width = batch["image"].shape
        return channels, height, width
