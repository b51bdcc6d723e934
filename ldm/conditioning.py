"""What a denoiser is conditioned on, as one object from the conditioner to the backbone."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    keys_values: Tensor | None = None  # (B, L, K) one U-Net's own, of the tokens: see Denoiser.prepared

    def where(self, keep: Tensor, null: "Conditioning") -> "Conditioning":
        """Row i of self where keep[i], else row i of `null` (B or 1 rows). keep: (B,) bool. This is caption dropout."""
        return self.map(lambda a, b: torch.where(keep.view(-1, *(1,) * (a.dim() - 1)), a, b), null)

    def cat(self, other: "Conditioning") -> "Conditioning":
        """The rows of self, then those of `other`: one batched call for guidance."""
        return self.map(lambda a, b: torch.cat([a, b]), other)

    def expand(self, n: int) -> "Conditioning":
        """One row, or n of them -> n rows."""
        return self.map(lambda part: part.expand(n, *part.shape[1:]))

    def map(self, function: Callable[..., Tensor], *others: "Conditioning") -> "Conditioning":
        """function(part, the others' same part ...) for each part that is there."""
        parts: list[Any] = []
        for part, *theirs in zip(self, *others, strict=True):
            assert all((each is None) == (part is None) for each in theirs), "conditionings must have the same parts"
            parts.append(None if part is None else function(part, *theirs))
        return Conditioning(*parts)

    def concat_to(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + S, H, W): the backbone's input. x may have fewer rows, see `repeated`."""
        if self.spatial is None:
            return x
        return torch.cat([repeated(x, len(self.spatial)), self.spatial.to(x.dtype)], dim=1)


def repeated(x: Tensor, rows: int) -> Tensor:
    """(B, ...) -> (rows, ...): all of x, again and again; B divides rows. Guidance asks for one x under several conditions."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))
