"""DiT (Peebles & Xie 2023): a transformer over patches, modulated by the noise level; text enters as in PixArt-α.

Shapes: x (B, in_channels, H, W) -> (B, out_channels, H, W); c_noise (B,); cond.tokens (B, L, context_channels); N patches
of width D.
"""

from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.models.layers import Attention
from ldm.models.transformer import (
    Norm,
    PatchTransformer,
    coordinates,
    feed_forward,
    layer_norm,
    modulate,
    rotary,
    sin_cos,
)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention (when there is a context), feed-forward: adaLN-zero around the first and the last."""

    def __init__(self, width: int, heads: int, cross: bool, norm: Norm, qk_norm: bool, swiglu: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = norm(width)
        self.attn1 = Attention(width, heads, width // heads, bias=True, qk_norm=qk_norm)
        self.attn2 = Attention(width, heads, width // heads, bias=True, qk_norm=qk_norm) if cross else None
        self.norm2 = norm(width)
        self.ff = feed_forward(width, swiglu)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, mask: Tensor,
                rotation: tuple[Tensor, Tensor] | None) -> Tensor:  # fmt: skip
        """x: (B, N, D); embedding: (B, D); context: (B, L, D); mask: (B, L) bool; rotation: of self-attention."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn1(modulate(self.norm1(x), shift1, scale1), rotation=rotation)
        if self.attn2 is not None:
            x = x + self.attn2(x, context, mask)
        return x + gate2 * self.ff(modulate(self.norm2(x), shift2, scale2))


class DiT(PatchTransformer):
    """Sized by its arguments; a fresh network returns zero.

    Args:
        depth: number of blocks.
        sin_cos: add fixed sine-cosine positions to the patches (DiT).
        rope: turn queries and keys by their places (RoPE in two dimensions; LightningDiT has both).
        qk_norm, swiglu: the normalized queries and keys and the gated feed-forward of LightningDiT (Yao et al. 2025).
        For the others see PatchTransformer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        depth: int,
        heads: int,
        patch: int = 2,
        context_channels: int = 0,
        vector_channels: int = 0,
        sin_cos: bool = True,
        rope: bool = False,
        base: int | None = None,
        norm: Norm = layer_norm,
        qk_norm: bool = False,
        swiglu: bool = False,
        noise_scale: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, width, heads, patch, context_channels, vector_channels, base, norm,
                         noise_scale, checkpointing)  # fmt: skip
        if rope and self.head_dim % 4:
            raise UserError(
                f"dit: rope needs a head width that is a multiple of 4; {width} / {heads} heads is {self.head_dim}"
            )
        self.sin_cos, self.rope = sin_cos, rope
        if context_channels:
            self.context_embed = nn.Sequential(
                nn.Linear(context_channels, width), nn.GELU("tanh"), nn.Linear(width, width)
            )
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, context_channels > 0, norm, qk_norm, swiglu) for _ in range(depth)
        )
        crosses = [block.attn2.to_out for block in self.blocks if block.attn2 is not None]
        self.initialize(*(block.modulation for block in self.blocks), *crosses)

    def transform(self, x: Tensor, axes: tuple[int, int], embedding: Tensor, cond: Conditioning) -> Tensor:
        places = coordinates(*axes, self.base, x.device)
        if self.sin_cos:
            x = x + sin_cos(places, self.width).to(x.dtype)
        rotation = rotary(places, self.head_dim) if self.rope else None
        context = self.context_embed(cond.tokens) if self.context_channels else None
        for block in self.blocks:
            x = self.run(block, x, embedding, context, cond.mask, rotation)
        return x
