"""The KL-regularized autoencoder (Rombach et al. 2022, appendix G), in the structure of Stable Diffusion's.

Shapes: images (B, 3, H, W) in [-1, 1]; moments (B, 2z, H/f, W/f); latents (B, z, H/f, W/f); f = 2^(levels - 1).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
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

    def forward(self, x: Tensor) -> Tensor:
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


class AutoencoderKL(nn.Module):
    """Images to a Gaussian posterior over latents, and latents back to images.

    Args:
        latent_channels: z.
        channels: width of the first level.
        multipliers: width of each level over `channels`; the grid halves between levels, so f = 2^(levels - 1).
        blocks: residual blocks per level (the decoder has one more).
        attention: per level, whether attention follows each residual block; None for nowhere.
        middle_attention: attention at the lowest resolution, as the published models have.
        groups: of the group normalizations.

    Raises:
        UserError: when the arguments do not fit each other, or an image's side is not a multiple of f.
    """

    def __init__(
        self,
        latent_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int = 2,
        attention: Sequence[bool] | None = None,
        middle_attention: bool = True,
        groups: int = 32,
    ) -> None:
        super().__init__()
        attention = [False] * len(multipliers) if attention is None else attention
        if len(attention) != len(multipliers):
            raise UserError(f"autoencoder: {len(attention)} attention flags for {len(multipliers)} multipliers")
        if channels % groups:
            raise UserError(f"autoencoder: {channels} channels do not divide into {groups} groups; change one of them")
        self.latent_channels, self.factor = latent_channels, 2 ** (len(multipliers) - 1)
        shape = (channels, multipliers, blocks, attention, middle_attention)
        self.encoder = Encoder(*shape, 2 * latent_channels, groups)
        self.decoder = Decoder(*shape, latent_channels, groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """images: (B, 3, H, W) in [-1, 1]."""
        _, channels, height, width = images.shape
        if channels != 3 or height % self.factor or width % self.factor:
            raise UserError(
                f"autoencoder: images are {channels}x{height}x{width}; expected 3 channels and sides that are "
                f"multiples of {self.factor}: change data.side"
            )
        return Posterior.of(self.quant_conv(self.encoder(images)))

    def decode(self, z: Tensor) -> Tensor:
        """z: (B, z, h, w), as sampled from the posterior -> (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """The latents' (z, h, w) of square images."""
        return self.latent_channels, side // self.factor, side // self.factor
