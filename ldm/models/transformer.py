"""What the transformers over patches share: both ends of the network, positions, the feed-forward.

Shapes: x (B, in_channels, H, W) -> (B, out_channels, H, W); p patch side; N = H/p * W/p tokens of width D; c_noise (B,);
cond.tokens (B, L, context_channels); embedding (B, D) of noise level and vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.models.layers import GEGLU, sinusoidal, zero

FREQUENCIES = 256  # features of the noise level before its embedding
# width -> module; adaptive scale and shift follow it, so by default it has none of its own
Norm = Callable[[int], nn.Module]
layer_norm: Norm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


def coordinates(height: int, width: int, base: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Column and row of each of height * width patches, (N,) float32 each, row by row.

    base: both axes are stretched to 0 ... base (PixArt-α, Chen et al. 2023); None counts patches.
    """
    rows, columns = (torch.arange(n, device=device) * (1 if base is None else base / n) for n in (height, width))
    return columns.float().repeat(height), rows.float().repeat_interleave(width)


def sin_cos(axes: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Fixed positions (N, width): sines then cosines of the column, the same of the row (DiT, from MAE)."""
    return torch.cat([sinusoidal(axis, width // 2).roll(width // 4, dims=1) for axis in axes], dim=1)


def rotary(axes: tuple[Tensor, Tensor], head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, head_dim / 2) of rotary positions: half the pairs turn with the column, half with the row."""
    columns, rows = (sinusoidal(axis, head_dim // 2).chunk(2, dim=1) for axis in axes)
    return torch.cat([columns[0], rows[0]], dim=1), torch.cat([columns[1], rows[1]], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (B, N, D); shift, scale: (B, 1, D)."""
    return x * (1 + scale) + shift


def unpatchify(x: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, height * width, p * p * C) -> (B, C, height * p, width * p)."""
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class SwiGLU(GEGLU):
    """Gated linear unit with SiLU (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.silu(gate)


def feed_forward(width: int, swiglu: bool = False) -> nn.Sequential:
    """Four times as wide inside; with the gate 8/3 times, which has as many weights."""
    if swiglu:
        return nn.Sequential(SwiGLU(width, 8 * width // 3), nn.Linear(8 * width // 3, width))
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))


class PatchTransformer(nn.Module, ABC):
    """Patches in, adaptive norm and patches out; `transform` is what stands between.

    Args:
        in_channels, out_channels: of the grid.
        width: of a token, D. A multiple of 4 (two axes of sines and cosines) and of `heads`.
        heads: of the attention.
        patch: side of a patch; both sides of the input must be multiples of it.
        context_channels: width of cond.tokens; 0 takes none.
        vector_channels: width of cond.vector, added to the noise embedding; 0 takes none.
        base: side in patches of the grid that positions are stretched to; None counts patches.
        norm: width -> the normalization that the noise embedding scales and shifts.
        noise_scale: factor on c_noise before its sinusoidal embedding: 1 for step indices, about 1000 for t in [0, 1].
        checkpointing: keep only each block's input in training and compute the rest again: less memory, a third slower.

    Raises:
        UserError: when the arguments do not fit each other, or an input does not fit the network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        heads: int,
        patch: int,
        context_channels: int,
        vector_channels: int,
        base: int | None,
        norm: Norm,
        noise_scale: float,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__.lower()
        if width % heads or width % 4:
            raise UserError(
                f"{self.name}: width {width} does not divide into {heads} heads, or by 4; change width or heads"
            )
        self.in_channels, self.width, self.head_dim, self.patch = in_channels, width, width // heads, patch
        self.context_channels, self.vector_channels = context_channels, vector_channels
        self.base, self.noise_scale, self.checkpointing = base, noise_scale, checkpointing
        self.patch_embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.time_embed = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        if vector_channels:
            self.label_emb = nn.Sequential(nn.Linear(vector_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.norm_out, self.modulation = norm(width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch * patch * out_channels)

    @abstractmethod
    def transform(self, x: Tensor, axes: tuple[int, int], embedding: Tensor, cond: Conditioning) -> Tensor:
        """x: (B, N, D) patches without positions; axes: their rows and columns -> (B, N, D)."""

    def initialize(self, *zeros: nn.Module) -> None:
        """DiT's: Xavier for linear maps, N(0, 0.02) for the noise embedding; `zeros` and the output start at zero."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight.flatten(1))  # a view: a convolution as the linear map that it is
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        for layer in (self.time_embed[0], self.time_embed[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.modulation, self.out, *zeros):
            zero(layer)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        self._check(x, cond)
        height, width = (side // self.patch for side in x.shape[2:])
        embedding = self.time_embed(sinusoidal(c_noise * self.noise_scale, FREQUENCIES).to(x.dtype))
        if self.vector_channels:
            embedding = embedding + self.label_emb(cond.vector)
        embedding = F.silu(embedding)  # every modulation begins with it
        x = self.transform(self.patch_embed(x).flatten(2).transpose(1, 2), (height, width), embedding, cond)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
        return unpatchify(self.out(modulate(self.norm_out(x), shift, scale)), height, width, self.patch)

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():  # no block draws random numbers, whose state would matter
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def _check(self, x: Tensor, cond: Conditioning) -> None:
        _, channels, height, width = x.shape
        if channels != self.in_channels:
            raise UserError(
                f"{self.name}: the input has {channels} channels, the network takes {self.in_channels} (in_channels)"
            )
        if height % self.patch or width % self.patch:
            raise UserError(
                f"{self.name}: the input is {height}x{width}; both sides must be multiples of {self.patch} (patch): "
                "change data.side"
            )
        for part, size in {"tokens": self.context_channels, "vector": self.vector_channels}.items():
            given = getattr(cond, part).shape[-1]
            if size and given != size:
                argument = {"tokens": "context_channels", "vector": "vector_channels"}[part]
                raise UserError(f"{self.name}: cond.{part} has {given} features, the network takes {size} ({argument})")
