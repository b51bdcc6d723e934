"""The autoencoder, KL-regularized (Rombach et al. 2022, appendix G), in the structure of Stable Diffusion's.

Shapes: images (B, 3, H, W) in [-1, 1]; moments (B, 2z, H/f, W/f); latents (B, z, H/f, W/f); f = 2^(levels - 1).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.models.layers import Upsample, per_token


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents. mean, logvar: (B, z, h, w); logvar in [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "Posterior":
        """moments: (B, 2z, h, w), as the encoder gives them or a cache stores them."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30, 20))

    def sample(self, noise: Tensor) -> Tensor:
        """noise: (B, z, h, w) unit normal."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """(B,): KL divergence from the unit normal, summed over latent elements, in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)
        self.change = channels != out_channels
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.change else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the grid, projected by 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (per_token(layer, h)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, N, C): one head
        h = per_token(self.proj_out, F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class AsymmetricDownsample(nn.Module):
    """Strided 3x3 convolution, padded at the right and the bottom only, as the published first stages are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if asked, then a change of resolution or none."""

    def __init__(self, widths: Sequence[int], attention: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(b, groups) for b in widths[1:] if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, out_channels, H/f, W/f)."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, attention: Sequence[bool],
                 middle_attention: bool, out_channels: int, groups: int) -> None:  # fmt: skip
        super().__init__()
        widths = [channels, *(m * channels for m in multipliers)]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            level = Level([a, *[b] * blocks], attention[i], groups)
            if i < len(multipliers) - 1:
                level.downsample = AsymmetricDownsample(b)
            self.down.append(level)
        self.mid = Middle(widths[-1], middle_attention, groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.down) - 1:
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z, H/f, W/f) -> (B, 3, H, W). `up` is indexed by level, so it is walked from its end."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, attention: Sequence[bool],
                 middle_attention: bool, latent_channels: int, groups: int) -> None:  # fmt: skip
        super().__init__()
        widths = [m * channels for m in multipliers]
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], middle_attention, groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            level = Level([above, *[width] * (blocks + 1)], attention[i], groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for i, level in reversed(list(enumerate(self.up))):
            x = level(x)
            if i > 0:
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Coded(NamedTuple):
    """What training decodes. latents: (B, z, h, w); penalty: (B,), beside a distance summed over a picture's elements;
    name: the penalty's."""

    latents: Tensor
    penalty: Tensor
    name: str


class Autoencoder(nn.Module):
    """Encoder and decoder, what both kinds of first stage share.

    Args:
        encoder_channels: of the encoder's output.
        decoder_channels: of the decoder's input.
        channels: width of the first level.
        multipliers: width of each level over `channels`; the grid halves between levels, so f = 2^(levels - 1).
        blocks: residual blocks per level (the decoder has one more).
        attention: per level, whether attention follows each residual block; None for nowhere.
        middle_attention: attention at the lowest resolution, as the published models have.
        groups: of the group normalizations.
        checkpointing: keep no activations inside residual blocks: the backward pass computes them again.

    Raises:
        UserError: when the arguments do not fit each other, or an image's side is not a multiple of f.
    """

    latent_channels: int
    quant_conv: nn.Conv2d
    post_quant_conv: nn.Conv2d

    def __init__(
        self,
        encoder_channels: int,
        decoder_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int = 2,
        attention: Sequence[bool] | None = None,
        middle_attention: bool = True,
        groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        attention = [False] * len(multipliers) if attention is None else attention
        if len(attention) != len(multipliers):
            raise UserError(f"autoencoder: {len(attention)} attention flags for {len(multipliers)} multipliers")
        if channels % groups:
            raise UserError(f"autoencoder: {channels} channels do not divide into {groups} groups; change one of them")
        self.factor = 2 ** (len(multipliers) - 1)
        shape = (channels, multipliers, blocks, attention, middle_attention)
        self.encoder = Encoder(*shape, encoder_channels, groups)
        self.decoder = Decoder(*shape, decoder_channels, groups)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                module.checkpointing = checkpointing

    def check(self, images: Tensor) -> None:
        """Raises UserError for pictures that are not (B, 3, H, W), finite, with sides that are multiples of f."""
        _, channels, height, width = images.shape
        if channels != 3 or height % self.factor or width % self.factor:
            raise UserError(
                f"autoencoder: images are {channels}x{height}x{width}; expected 3 channels and sides that are "
                f"multiples of {self.factor}: change data.side"
            )
        # on a GPU the answer would have to be waited for; there the loss is what is watched (training/faults.py)
        if images.device.type == "cpu" and not images.isfinite().all():
            raise UserError("autoencoder: the images hold NaN or infinity; pictures are numbers in [-1, 1]")

    def _encoded(self, images: Tensor) -> Tensor:
        self.check(images)
        return self.quant_conv(self.encoder(images))

    def freeze_encoder(self) -> None:
        """Leaves only the decoder to be trained: what latents depend on stays as it is."""
        for part in (self.encoder, self.quant_conv):
            part.requires_grad_(False)

    def decode(self, z: Tensor) -> Tensor:
        """z: (B, z, h, w), as sampled from the posterior -> (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.before_decoder(z))

    def decode_coded(self, latents: Tensor) -> Tensor:
        """The same for what `code` gave."""
        return self.decoder(self.post_quant_conv(latents))

    def before_decoder(self, z: Tensor) -> Tensor:
        return self.post_quant_conv(z)

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """The latents' (z, h, w) of square images."""
        return self.latent_channels, side // self.factor, side // self.factor


class AutoencoderKL(Autoencoder):
    """Images to a Gaussian posterior over latents, and latents back to images.

    Args:
        latent_channels: z.
        channels, multipliers, blocks, attention, middle_attention, groups, checkpointing: see Autoencoder.
    """

    def __init__(
        self, latent_channels: int, channels: int, multipliers: Sequence[int], blocks: int = 2, **shape: Any
    ) -> None:
        super().__init__(2 * latent_channels, latent_channels, channels, multipliers, blocks, **shape)
        self.latent_channels = latent_channels
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """images: (B, 3, H, W) in [-1, 1]."""
        return Posterior.of(self._encoded(images))

    def code(self, images: Tensor, random: KeyedRandom) -> Coded:
        """What a training step decodes: a sample of the posterior, whose noise is the sample's own."""
        posterior = self.encode(images)
        noise = random.normal("posterior", posterior.mean.shape[1:])
        return Coded(posterior.sample(noise), posterior.kl(), "kl")

    def count(self, posterior: Posterior) -> Tensor:
        """(2,): KL divergence in nats, summed over pictures, and their number."""
        return torch.stack([posterior.kl().double().sum(), torch.tensor(float(len(posterior.mean))).to(posterior.mean)])

    def code_counts(self, posterior: Posterior) -> None:
        """There is no codebook."""

    def measures(self, counts: Tensor) -> dict[str, Tensor]:
        """`kl` in nats per picture."""
        return {"kl": counts[0] / counts[1]}
