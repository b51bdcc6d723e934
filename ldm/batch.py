"""The one list of batch keys, and the two conversions between stored and network pixels."""

from typing import TypedDict

import torch
from torch import Tensor


class Batch(TypedDict, total=False):
    """One micro-batch as the data module yields it."""

    image: Tensor  # (B, 3, H, W) uint8
    caption: list[str]
    key: list[str]  # the sample's name in its shard
    index: Tensor  # (B,) int64: position in the run's sample sequence, which keys every random draw
    cursor: Tensor  # (B, 3) int64: (stream, turn, position), where the reader stands after this sample (data/stream.py)
    dropped: dict[str, int]  # reason -> unusable samples skipped since the last batch


def to_unit(image: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 in 0..255, rounded and clipped (truncation darkens and moves FID)."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
