"""The U-Net of latent diffusion (Rombach et al. 2022, as in Stable Diffusion), sized by its arguments.

Shapes: x (B, in_channels, H, W) -> (B, out_channels, H, W); c_noise (B,); cond.tokens (B, L, context_channels).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.conditioning import Conditioning, repeated
from ldm.errors import UserError
from ldm.models.layers import Downsample, TransformerBlock, Upsample, per_token, sinusoidal, zero


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the noise embedding; the second starts at zero.

    The embedding is added, or with `scale_shift` scales and shifts what the normalization gives (ADM, Dhariwal & Nichol 2021).
    """

    def __init__(self, channels: int, out_channels: int, embed_channels: int, groups: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_channels, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # keeps CompVis' index: a dropout stood there
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h, modulation = self.in_layers(x), self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + modulation)
        return self.skip_connection(x) + h


class SpatialTransformer(nn.Module):
    """Transformer blocks over the grid's tokens, with cross-attention to the context if there is one; starts as the identity."""

    def __init__(self, channels: int, heads: int, head_dim: int, depth: int, context_channels: int, groups: int,
                 linear: bool, self_attention: bool = True) -> None:  # fmt: skip
        super().__init__()
        # SD v1 stores the projections as 1x1 convolutions, SD v2 and SDXL as linear layers: the same mathematics
        inner = heads * head_dim
        self.cross = context_channels > 0
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, heads, head_dim, context_channels or None, self_attention) for _ in range(depth)
        )
        self.proj_out = zero(nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        h = per_token(self.proj_in, h)
        context = (cond.tokens, cond.mask) if self.cross else (None, None)
        for block in self.transformer_blocks:
            given = None if cond.keys_values is None or not self.cross else cond.keys_values[:, :, block.columns]
            h = block(h, *context, given)
        h = per_token(self.proj_out, h)
        return repeated(x, len(h)) + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.ModuleList):
    """Layers in a row, each given what it takes; with `recompute`, the backward pass makes their activations again."""

    def forward(self, x: Tensor, embedding: Tensor, cond: Conditioning, recompute: bool = False) -> Tensor:
        for layer in self:
            inputs: list[Any] = [x]
            if isinstance(layer, ResBlock):
                inputs.append(embedding[: len(x)])  # x may not have met cond yet
            elif isinstance(layer, SpatialTransformer):
                inputs.append(cond)
            # nothing in here draws random numbers, whose state would have to be kept
            x = (
                checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else layer(*inputs)
            )
        return x


class Levels(nn.Embedding):
    """(B, 1) whole numbers -> (B, width)."""

    def forward(self, vector: Tensor) -> Tensor:
        return super().forward(vector[:, 0].long())


class UNet(nn.Module):
    """A backbone: (x_in, c_noise, cond) -> F.

    Under guidance, k conditions of one x, what comes before the first cross-attention is computed once.

    Args:
        in_channels: latent channels plus those of cond.spatial.
        out_channels: latent channels.
        channels: width of the first level.
        multipliers: width of each level over `channels`; the grid halves between levels.
        blocks: residual blocks per level on the way down (one more on the way up).
        depths: transformer blocks after each residual block of a level; 0 for none.
        middle_depth: transformer blocks in the middle.
        context_channels: width of cond.tokens; 0 takes none.
        heads, head_dim: give one: SD v1 fixes the number of heads (8), SD v2 and SDXL their width (64).
        linear: project into the transformers by linear layers (SD v2, SDXL) in place of 1x1 convolutions (SD v1).
        vector_channels: width of cond.vector, added to the noise embedding; 0 takes none.
        vector_levels: cond.vector is (B, 1), a whole number below this with an embedding of its own (the x4 upscaler's
            noise level of the small picture); 0 for none.
        self_attention: per level, whether its transformers attend to the grid first; without, twice to the context (the
            x4 upscaler). None for everywhere; the middle always does.
        groups: of the group normalizations.
        scale_shift: let the noise embedding scale and shift features (ADM, GLIDE, unCLIP) in place of adding to them (SD).
        coordinates: append two channels, x and y in [-1, 1], to the input (CoordConv, Liu et al. 2018). Without them a
            U-Net knows where it is only from the zeros that its convolutions pad with.
        noise_scale: factor on c_noise before its sinusoidal embedding: 1 for step indices, about 1000 for t in [0, 1].
        checkpointing: keep only each layer's input in training and compute the rest again: less memory, a third slower.

    Raises:
        UserError: when the arguments do not fit each other, or an input does not fit the network.
    """

    shares_rows = True  # see Denoiser

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        depths: Sequence[int],
        middle_depth: int,
        context_channels: int,
        heads: int | None = None,
        head_dim: int | None = None,
        linear: bool = False,
        vector_channels: int = 0,
        vector_levels: int = 0,
        self_attention: Sequence[bool] | None = None,
        groups: int = 32,
        scale_shift: bool = False,
        coordinates: bool = False,
        noise_scale: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self_attention = [True] * len(multipliers) if self_attention is None else self_attention
        if not len(depths) == len(multipliers) == len(self_attention):
            counts = f"{len(depths)} depths, {len(self_attention)} self_attention"
            raise UserError(f"unet: {counts} for {len(multipliers)} multipliers; give one of each a level")
        if vector_channels and vector_levels:
            raise UserError(
                f"unet: vector_channels={vector_channels}, vector_levels={vector_levels}; give one of the two"
            )
        if (heads is None) == (head_dim is None):
            raise UserError(f"unet: heads={heads} and head_dim={head_dim}; give exactly one of the two")
        if channels % groups:
            raise UserError(f"unet: {channels} channels do not divide into {groups} groups; change channels or groups")
        self.in_channels, self.channels = in_channels, channels
        self.vector_width = vector_channels or min(vector_levels, 1)
        self.coordinates, self.checkpointing = coordinates, checkpointing
        self.noise_scale, self.factor = noise_scale, 2 ** (len(multipliers) - 1)
        embed = 4 * channels

        def residual(width: int, out: int) -> ResBlock:
            return ResBlock(width, out, embed, groups, scale_shift)

        def transformer(width: int, depth: int, own: bool = True) -> list[SpatialTransformer]:
            if depth == 0:
                return []
            n = heads or width // (head_dim or 1)
            return [SpatialTransformer(width, n, width // n, depth, context_channels, groups, linear, own)]

        self.time_embed = _embedding(channels, embed)
        if self.vector_width:
            self.label_emb = Levels(vector_levels, embed) if vector_levels else _embedding(vector_channels, embed)

        levels = list(zip([m * channels for m in multipliers], depths, self_attention, strict=True))
        width = channels
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels + 2 * coordinates, width, 3, padding=1)])])
        skips = [width]
        for level, (out, depth, own) in enumerate(levels):
            for _ in range(blocks):
                self.input_blocks.append(Stage([residual(width, out), *transformer(out, depth, own)]))
                width = out
                skips.append(width)
            if level < len(levels) - 1:
                self.input_blocks.append(Stage([Downsample(width)]))
                skips.append(width)

        self.middle_block = Stage([residual(width, width), *transformer(width, middle_depth), residual(width, width)])

        self.output_blocks = nn.ModuleList()
        for level, (out, depth, own) in reversed(list(enumerate(levels))):
            for i in range(blocks + 1):
                stage = Stage([residual(width + skips.pop(), out), *transformer(out, depth, own)])
                width = out
                if level > 0 and i == blocks:
                    stage.append(Upsample(width))
                self.output_blocks.append(stage)

        self.out = nn.Sequential(
            nn.GroupNorm(groups, width), nn.SiLU(), zero(nn.Conv2d(width, out_channels, 3, padding=1))
        )
        self._place_keys_values()

    def _place_keys_values(self) -> None:
        """In cond.keys_values all cross-attentions' stand side by side."""
        end = 0
        for block in self._crossed():
            block.columns = slice(end, end := end + 2 * block.attn2.to_k.out_features)

    def _crossed(self) -> list[TransformerBlock]:
        return [module for module in self.modules() if isinstance(module, TransformerBlock) and module.cross]

    def prepared(self, cond: Conditioning) -> Conditioning:
        """With the keys and values that its cross-attentions make of cond.tokens: a sampler's steps share them."""
        made = [part for block in self._crossed() for part in block.attn2.keys_values(cond.tokens)]
        return cond._replace(keys_values=torch.cat(made, dim=2)) if made else cond

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        self._check(x, cond)
        rows = len(cond.tokens)
        embedding = repeated(self.time_embed(sinusoidal(c_noise * self.noise_scale, self.channels).to(x.dtype)), rows)
        if self.vector_width:
            x, embedding = repeated(x, rows), embedding + self.label_emb(cond.vector)
        if self.coordinates:
            x = torch.cat([x, _coordinates(x)], dim=1)
        recompute = self.checkpointing and torch.is_grad_enabled()
        skips = []
        for stage in self.input_blocks:
            x = stage(x, embedding, cond, recompute)
            skips.append(x)
        x = self.middle_block(x, embedding, cond, recompute)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, repeated(skips.pop(), len(x))], dim=1), embedding, cond, recompute)
        return repeated(self.out(x), rows)

    def _check(self, x: Tensor, cond: Conditioning) -> None:
        _, channels, height, width = x.shape
        if channels != self.in_channels:
            raise UserError(
                f"unet: the input has {channels} channels, the network takes {self.in_channels} (in_channels)"
            )
        if height % self.factor or width % self.factor:
            raise UserError(
                f"unet: the input is {height}x{width}; both sides must be multiples of {self.factor}: change data.side"
            )
        if self.vector_width and cond.vector.shape[1] != self.vector_width:
            raise UserError(
                f"unet: cond.vector has {cond.vector.shape[1]} features, the network takes {self.vector_width} "
                "(vector_channels, or 1 for vector_levels)"
            )


def _embedding(width: int, embed: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, embed), nn.SiLU(), nn.Linear(embed, embed))


def _coordinates(x: Tensor) -> Tensor:
    """(B, 2, H, W): x and y from -1 at the first pixel to 1 at the last."""
    height, width = x.shape[2:]
    rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
    columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy")).expand(len(x), 2, height, width)
