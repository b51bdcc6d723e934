"""The one list of batch keys, and the two conversions between stored and network pixels."""

from typing import TypedDict

import torch
from torch import Tensor


class Batch(TypedDict, total=False):
    """One micro-batch as the data module yields it."""

    image: Tensor  # (B, 3, H, W) uint8
    moments: Tensor  # (B, 2z, h, w) float16, in place of `image`: the posterior's mean and logvar out of a latent cache
    caption: list[str]
    text_tokens: Tensor  # (B, L, D) float16: the caption encoded, out of a cache that holds text; 0 where masked
    text_mask: Tensor  # (B, L) bool
    text_vector: Tensor  # (B, V) float16
    key: list[str]  # the sample's name in its shard
    index: Tensor  # (B,) int64: position in the run's sample sequence, which keys every random draw
    cursor: Tensor  # (B, 3) int64: (stream, turn, position), where the reader stands after this sample (data/stream.py)
    original_size: Tensor  # (B, 2) int64: height and width of the picture before any resizing
    crop: Tensor  # (B, 2) int64: top and left of the crop in the resized picture
    target_size: Tensor  # (B, 2) int64: height and width to train on or to draw; absent: what the conditioner says
    label: Tensor  # (B,) int64: class; absent: the caption is its number
    mask: Tensor  # (B, 1, H, W) bool, True where to paint: inpainting; absent in training: drawn
    low_resolution: Tensor  # (B, 3, h, w) uint8, to be enlarged; absent: made from `image`
    noise_level: (
        Tensor  # (B,) int64: of what a conditioner noises; absent: drawn in training, else the conditioner's own
    )
    depth: Tensor  # (B, 1, H, W) float, in any unit; absent: estimated from `image`
    dropped: dict[str, int]  # reason -> unusable samples skipped since the last batch
    dropped_where: dict[str, str]  # reason -> shard and key of the last of them


def to_unit(image: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 in 0..255, rounded and clipped (truncation darkens and moves FID)."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
