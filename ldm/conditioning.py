"""What a denoiser is conditioned on, as one object from the conditioner to the backbone."""

from typing import NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """B samples, L tokens of width D, V pooled features, S spatial channels.

    A NamedTuple because Lightning moves it to the device as it is (it refuses frozen dataclasses).
    """

    tokens: Tensor  # (B, L, D)    context for cross- or joint attention
    mask: Tensor  # (B, L) bool  True where a token is real
    vector: Tensor  # (B, V)       pooled text, size and crop, class: added to the noise embedding; V may be 0
    spatial: Tensor | None = None  # (B, S, H, W) stacked onto the latent: inpainting, super-resolution, depth

    def where(self, keep: Tensor, null: "Conditioning") -> "Conditioning":
        """Row i of self where keep[i], else row i of `null` (B or 1 rows). keep: (B,) bool. This is caption dropout."""
        return Conditioning(*(_where(keep, a, b) for a, b in zip(self, null, strict=True)))

    def cat(self, other: "Conditioning") -> "Conditioning":
        """The rows of self, then those of `other`: one batched call for guidance."""
        return Conditioning(*(None if a is None else torch.cat([a, b]) for a, b in zip(self, other, strict=True)))

    def concat_to(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + S, H, W): the backbone's input."""
        return x if self.spatial is None else torch.cat([x, self.spatial.to(x.dtype)], dim=1)


def _where(keep: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        assert a is b, "conditioning and its null must have the same parts"
        return None
    return torch.where(keep.view(-1, *(1,) * (a.dim() - 1)), a, b)
