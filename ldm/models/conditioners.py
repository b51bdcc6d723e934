"""Conditioners: batch -> Conditioning, and the null of guidance and dropout. The other place that reads a batch."""

from torch import Tensor, nn

from ldm.batch import Batch
from ldm.conditioning import Conditioning


class TextConditioner(nn.Module):
    """Captions through a text encoder, or out of a latent cache that holds them encoded; the null is the encoding of "".

    Args:
        encoder: captions -> (tokens (B, L, D), mask (B, L), vector (B, V)).
        pooled: whether the backbone gets the pooled vector too (SDXL does, SD v1 and v2 do not: V is 0).
    """

    def __init__(self, encoder: nn.Module, pooled: bool = False) -> None:
        super().__init__()
        self.encoder, self.pooled = encoder, pooled

    def forward(self, batch: Batch) -> Conditioning:
        if "text_tokens" in batch:
            return self._cond(batch["text_tokens"].float(), batch["text_mask"], batch["text_vector"].float())
        return self._cond(*self.encoder(batch["caption"]))

    def null(self, n: int) -> Conditioning:
        """n equal rows; encoded once."""
        row = self._cond(*self.encoder([""]))
        return Conditioning(*(_repeat(part, n) for part in row))

    def _cond(self, tokens: Tensor, mask: Tensor, vector: Tensor) -> Conditioning:
        return Conditioning(tokens, mask, vector if self.pooled else vector[:, :0])


def _repeat(part: Tensor | None, n: int) -> Tensor | None:
    return None if part is None else part.expand(n, *part.shape[1:])
