"""Blocks that the networks share.

Shapes: B batch, C channels, H x W grid, N = H*W grid tokens, L context tokens, D token width, E noise-embedding width.
Module names follow CompVis' latent-diffusion, so that its checkpoints' keys are ours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning import repeated


def zero(module: nn.Module) -> nn.Module:
    """The same module with weights and bias at zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal(x: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, width): cosines then sines at geometric frequencies (DDPM, appendix B)."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = x.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def per_token(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution as the linear layer that it is, over tokens: (B, N, C) -> (B, N, C').

    Published checkpoints hold some of these as convolutions; on tokens their backward pass is several times faster.
    """
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2) by a strided 3x3 convolution, padded on both sides (U-Net)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q: (B, heads, N, head_dim); k, v: (B, heads, L, head_dim); mask: (B, L) bool -> (B, N, heads * head_dim)."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return out.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of features by its token's angle. x: (B, heads, N, d); rotation: cosines and sines (N, d/2)."""
    (a, b), (cos, sin) = x.unflatten(3, (-1, 2)).unbind(4), rotation
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=4).flatten(3).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """In the input's precision: beside bfloat16 queries, under autocast, a float32 weight has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention from x to a context, or to x itself.

    Args:
        width: of x.
        heads, head_dim: the inner width is heads * head_dim.
        context_width: of the context; None for self-attention.
        bias: of the projections to queries, keys and values.
        qk_norm: give each head's queries and keys unit mean square (Dehghani et al. 2023; RMS as in SD3).
    """

    def __init__(self, width: int, heads: int, head_dim: int, context_width: int | None = None, bias: bool = False,
                 qk_norm: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias)
        self.to_k = nn.Linear(context_width or width, heads * head_dim, bias)
        self.to_v = nn.Linear(context_width or width, heads * head_dim, bias)
        self.norm_q, self.norm_k = (RMSNorm(head_dim, 1e-6) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, width))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B, L, heads * head_dim)."""
        return self.to_k(context), self.to_v(context)

    def project(
        self, x: Tensor, context: Tensor | None = None, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, N, head_dim) of x; keys and values (B, heads, L, head_dim) of the context.

        given: (B, L, 2 * heads * head_dim): keys and values, where they are known.
        """
        made = self.keys_values(x if context is None else context) if given is None else given.chunk(2, dim=2)
        q, k, v = (rows.unflatten(2, (self.heads, -1)).transpose(1, 2) for rows in (self.to_q(x), *made))
        return self.norm_q(q), self.norm_k(k), v

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
                rotation: tuple[Tensor, Tensor] | None = None, given: Tensor | None = None) -> Tensor:  # fmt: skip
        """x: (B, N, width); context: (B, L, context_width); mask: (B, L) bool, True may be attended to.

        rotation: of queries and keys by their places (`rotate`), for self-attention. given: see `project`.
        """
        q, k, v = self.project(x, context, given)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.to_out(attend(q, k, v, mask))


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer, "GLU variants improve transformer")."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, mult: int = 4) -> None:
        super().__init__()
        # the Identity keeps CompVis' index: a dropout stood there
        self.net = nn.Sequential(GEGLU(width, mult * width), nn.Identity(), nn.Linear(mult * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention (when there is a context), feed-forward.

    Without `self_attention` the first attention is to the context too.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, context_width: int | None = None, self_attention: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, head_dim, None if self_attention else context_width)
        if context_width is not None:
            self.norm2 = nn.LayerNorm(width)
            self.attn2 = Attention(width, heads, head_dim, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)
        self.cross, self.self_attention = context_width is not None, self_attention

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
                given: Tensor | None = None) -> Tensor:  # fmt: skip
        """x: (B, N, width). With a context, `mask` (B, L) is the context's; without, it is x's own (B, N).

        A context of k B rows is k contexts of all of x, which meets them at its first cross-attention: (k B, N, width).
        given: the cross-attention's keys and values, where they are known (Attention.project).
        """
        own = (None, None if self.cross else mask) if self.self_attention else (context, mask)
        rows = len(x) if context is None else len(context)
        x = x if self.self_attention else repeated(x, rows)
        x = x + self.attn1(self.norm1(x), *own)
        if self.cross:
            x = repeated(x, rows)
            x = x + self.attn2(self.norm2(x), context, mask, given=given)
        return x + self.ff(self.norm3(x))
