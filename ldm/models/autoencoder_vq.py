"""The vector-quantized autoencoder (Esser et al. 2021), in the structure of CompVis' VQModel.

Latents for diffusion are the encoder's vectors before quantization; decoding quantizes them (Rombach et al. 2022, D.1).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.keyed_random import KeyedRandom
from ldm.models.autoencoder import Autoencoder, Coded, Posterior
from ldm.models.quantizer import VectorQuantizer, usage

LOGVAR = -30.0  # of the vectors as a posterior: none to speak of


class AutoencoderVQ(Autoencoder):
    """Images to vectors, each the nearest row of a codebook, and back.

    Args:
        latent_channels: of the encoder's output.
        quantizer: whose width is the vectors'; published models keep it equal to latent_channels.
        channels, multipliers, blocks, attention, middle_attention, groups, checkpointing: see Autoencoder.
    """

    def __init__(
        self, latent_channels: int, quantizer: VectorQuantizer, channels: int, multipliers: Sequence[int], **shape: Any
    ) -> None:
        super().__init__(latent_channels, latent_channels, channels, multipliers, **shape)
        self.latent_channels = quantizer.width
        self.quantize = quantizer
        self.quant_conv = nn.Conv2d(latent_channels, quantizer.width, 1)
        self.post_quant_conv = nn.Conv2d(quantizer.width, latent_channels, 1)

    def freeze_encoder(self) -> None:
        """The codebook stays too: the decoder's input is made of its rows."""
        super().freeze_encoder()
        self.quantize.requires_grad_(False)
        self.quantize.learning = False

    def encode(self, images: Tensor) -> Posterior:
        """images: (B, 3, H, W) in [-1, 1] -> the vectors before quantization, as a posterior without a variance."""
        vectors = self._encoded(images).float()
        return Posterior(vectors, torch.full_like(vectors, LOGVAR))

    def code(self, images: Tensor, random: KeyedRandom) -> Coded:
        """What a training step decodes. In training mode a codebook of moving averages takes the batch in."""
        vectors = self.encode(images).mean
        quantized = self.quantize(vectors)
        if self.training:
            self.quantize.learn(vectors.detach(), quantized.codes, random)
        return Coded(quantized.latents, quantized.penalty * images[0].numel(), "codebook")

    def before_decoder(self, z: Tensor) -> Tensor:
        """z: (B, z, h, w), any vectors: the nearest codes are decoded."""
        return super().before_decoder(self.quantize.lookup(self.quantize.nearest(z)))

    def count(self, posterior: Posterior) -> Tensor:
        """(K,): how often each code is chosen."""
        return torch.bincount(self.quantize.nearest(posterior.mean).flatten(), minlength=self.quantize.codes)

    code_counts = count

    def measures(self, counts: Tensor) -> dict[str, Tensor]:
        return usage(counts)
