"""Encoding and decoding pictures of any size in strips of rows, equal to doing it whole.

Tiles that are decoded apart and blended differ from the whole picture, because each normalizes by its own statistics. Here
every layer is finished for the whole picture before the next begins: activations stay on the host, one strip at a time is on
the network's device, and the group normalizations use the whole picture's mean and variance. Only attention, at the lowest
resolution, sees its whole input at once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import AttnBlock, AutoencoderKL, Level, Middle, Posterior, ResnetBlock
from ldm.models.layers import Upsample

Strip = Callable[[Tensor], Tensor]


class InStrips:
    """An autoencoder's encode and decode, without gradients.

    Args:
        autoencoder: in evaluation mode, on its device.
        rows: of a strip of the output of a layer, even.
    """

    def __init__(self, autoencoder: AutoencoderKL, rows: int = 64) -> None:
        assert rows > 0, rows
        assert rows % 2 == 0, rows
        self.autoencoder, self.rows = autoencoder, rows
        self.device = next(autoencoder.parameters()).device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """images: (B, 3, H, W) in [-1, 1] -> the posterior, on images' device."""
        self.autoencoder.check(images)
        encoder = self.autoencoder.encoder
        x = self._conv(encoder.conv_in, images)
        for i, level in enumerate(encoder.down):
            x = self._level(level, x)
            if i < len(encoder.down) - 1:
                x = self._conv(level.downsample.conv, x)
        x = self._conv(encoder.conv_out, self._middle(encoder.mid, x), encoder.norm_out)
        return Posterior.of(self._whole(self.autoencoder.quant_conv, x))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z: (B, z, h, w) -> (B, 3, H, W), on z's device."""
        decoder = self.autoencoder.decoder
        x = self._conv(decoder.conv_in, self._whole(self.autoencoder.before_decoder, z))
        x = self._middle(decoder.mid, x)
        for i, level in reversed(list(enumerate(decoder.up))):
            x = self._level(level, x)
            if i > 0:
                x = self._upsample(level.upsample, x)
        return self._conv(decoder.conv_out, x, decoder.norm_out)

    def _level(self, level: Level, x: Tensor) -> Tensor:
        for i, block in enumerate(level.block):
            x = self._resnet(block, x)
            if len(level.attn):
                x = self._whole(level.attn[i], x)
        return x

    def _middle(self, mid: Middle, x: Tensor) -> Tensor:
        x = self._resnet(mid.block_1, x)
        if isinstance(mid.attn_1, AttnBlock):
            x = self._whole(mid.attn_1, x)
        return self._resnet(mid.block_2, x)

    def _resnet(self, block: ResnetBlock, x: Tensor) -> Tensor:
        h = self._conv(block.conv2, self._conv(block.conv1, x, block.norm1), block.norm2)
        return h.add_(self._conv(block.nin_shortcut, x) if block.change else x)

    def _whole(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return layer(x.to(self.device)).to(x.device)

    def _conv(self, conv: nn.Conv2d, x: Tensor, norm: nn.GroupNorm | None = None) -> Tensor:
        """conv(silu(norm(x))), or conv(x)."""
        before = (lambda strip: strip) if norm is None else self._normalize(norm, x)
        reach, stride = conv.kernel_size[0], conv.stride[0]
        pad = 1 if reach == 3 and stride == 1 else 0  # a strided one is padded at the far sides only
        height = x.shape[2] // stride
        parts = []
        for start in range(0, height, self.rows):
            stop = min(start + self.rows, height)
            low, high = start * stride - pad, (stop - 1) * stride - pad + reach
            strip = before(x[:, :, max(low, 0) : high].to(self.device))
            missing = (pad, pad if stride == 1 else 1, max(-low, 0), max(high - x.shape[2], 0))
            strip = F.pad(strip, missing if reach == 3 else (0, 0, 0, 0))
            parts.append(F.conv2d(strip, conv.weight, conv.bias, conv.stride).to(x.device))
        return torch.cat(parts, dim=2)

    def _upsample(self, layer: Upsample, x: Tensor) -> Tensor:
        height, half = 2 * x.shape[2], self.rows // 2
        parts = []
        for start in range(0, x.shape[2], half):
            low, high = max(start - 1, 0), min(start + half + 1, x.shape[2])
            strip = layer(x[:, :, low:high].to(self.device))
            first = 2 * (start - low)
            parts.append(strip[:, :, first : first + min(self.rows, height - 2 * start)].to(x.device))
        return torch.cat(parts, dim=2)

    def _normalize(self, norm: nn.GroupNorm, x: Tensor) -> Strip:
        """silu(norm(.)) for strips of x, by the statistics of all of x."""
        grouped = x.unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, H, W)
        sums = torch.zeros(2, len(x), norm.num_groups, dtype=torch.float64, device=self.device)
        for part in grouped.split(self.rows, dim=3):
            part = part.to(self.device).double()
            sums += torch.stack([part.sum(dim=(2, 3, 4)), part.square().sum(dim=(2, 3, 4))])
        mean, square = sums / grouped[0, 0].numel()
        scale = (square - mean.square() + norm.eps).rsqrt()
        each = x.shape[1] // norm.num_groups
        scale, mean = (s.repeat_interleave(each, dim=1)[:, :, None, None] for s in (scale, mean))
        scale = scale * norm.weight[:, None, None]
        shift = norm.bias[:, None, None] - mean * scale
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        return lambda strip: F.silu(strip * scale + shift)
