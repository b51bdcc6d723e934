"""MMDiT (Esser et al. 2024, Stable Diffusion 3): text and image tokens, each with weights of their own, attend jointly.

Shapes: x (B, in_channels, H, W) -> (B, out_channels, H, W); c_noise (B,); cond.tokens (B, L, context_channels); N patches
of width D.
"""

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.models.layers import Attention, attend
from ldm.models.transformer import PatchTransformer, coordinates, feed_forward, layer_norm, modulate, sin_cos


class Stream(nn.Module):
    """One modality's half of a joint block.

    Args:
        dual: attend to the own stream too, beside the joint attention (SD3.5-medium).
        last: give queries, keys and values only: nothing comes after (the text of the last block).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, (2 if last else 9 if dual else 6) * width)
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads, width // heads, bias=True, qk_norm=qk_norm)
        self.attn2 = Attention(width, heads, width // heads, bias=True, qk_norm=qk_norm) if dual else None
        if last:
            self.attn.to_out = nn.Identity()
        else:
            self.norm2 = layer_norm(width)
            self.ff = feed_forward(width)

    def enter(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
        """x: (B, N, D) -> normalized x; its queries, keys and values; what is left of the modulation, (B, 1, D) each."""
        shift, scale, *rest = self.modulation(embedding)[:, None].split(x.shape[2], dim=2)
        x = self.norm1(x)
        return x, self.attn.project(modulate(x, shift, scale)), rest

    def leave(self, x: Tensor, normed: Tensor, attended: Tensor, modulation: list[Tensor]) -> Tensor:
        """x, normed, attended: (B, N, D) as it came, normalized, and from the joint attention -> (B, N, D)."""
        gate1, shift2, scale2, gate2, *dual = modulation
        x = x + gate1 * self.attn.to_out(attended)
        if self.attn2 is not None:
            shift, scale, gate = dual
            x = x + gate * self.attn2(modulate(normed, shift, scale))
        return x + gate2 * self.ff(modulate(self.norm2(x), shift2, scale2))


class JointBlock(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool, dual: bool, last: bool) -> None:
        super().__init__()
        self.image, self.text = Stream(width, heads, qk_norm, dual), Stream(width, heads, qk_norm, last=last)
        self.last = last

    def forward(self, x: Tensor, context: Tensor, embedding: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, N, D); context: (B, L, D); embedding: (B, D); mask: (B, N + L) bool."""
        x_normed, x_qkv, x_rest = self.image.enter(x, embedding)
        c_normed, c_qkv, c_rest = self.text.enter(context, embedding)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(x_qkv, c_qkv, strict=True))
        attended = attend(q, k, v, mask)
        x_attended, c_attended = attended.split([x.shape[1], context.shape[1]], dim=1)
        x = self.image.leave(x, x_normed, x_attended, x_rest)
        return x, context if self.last else self.text.leave(context, c_normed, c_attended, c_rest)


class MMDiT(PatchTransformer):
    """Sized by its arguments; a fresh network returns zero. SD3 has width = 64 * depth and heads = depth.

    Args:
        depth: number of joint blocks; the last one drops the text.
        side: rows and columns of the table of positions, `pos_embed`, of which an input takes the center.
        base: rows and columns that the table is stretched to: SD3's 192 patches cover 0 ... 64.
        dual_blocks: the first so many blocks have a second attention, within the image (13 in SD3.5-medium).
        qk_norm: normalized queries and keys (SD3.5).
        For the others see PatchTransformer. SD3 attends to padding as well: give it a mask that is True everywhere.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: int,
        heads: int,
        side: int,
        context_channels: int,
        vector_channels: int,
        patch: int = 2,
        base: int | None = None,
        dual_blocks: int = 0,
        qk_norm: bool = False,
        noise_scale: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, width, heads, patch, context_channels, vector_channels, base,
                         layer_norm, noise_scale, checkpointing)  # fmt: skip
        self.side = side
        table = sin_cos(coordinates(side, side, base, self.out.weight.device), width)
        self.register_buffer("pos_embed", table[None])
        self.context_embed = nn.Linear(context_channels, width)
        self.blocks = nn.ModuleList(
            JointBlock(width, heads, qk_norm, i < dual_blocks, i == depth - 1) for i in range(depth)
        )
        self.initialize(*(stream.modulation for block in self.blocks for stream in (block.image, block.text)))

    def transform(self, x: Tensor, axes: tuple[int, int], embedding: Tensor, cond: Conditioning) -> Tensor:
        x = x + self._positions(*axes).to(x.dtype)
        context = self.context_embed(cond.tokens)
        mask = torch.cat([cond.mask.new_ones(x.shape[:2]), cond.mask], dim=1)
        for block in self.blocks:
            x, context = self.run(block, x, context, embedding, mask)
        return x

    def _positions(self, height: int, width: int) -> Tensor:
        """(1, N, D): the center of the table."""
        if max(height, width) > self.side:
            raise UserError(
                f"mmdit: the input is {height}x{width} patches, the table of positions has {self.side} (side)"
            )
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))
        return table[:, top : top + height, left : left + width].flatten(1, 2)
