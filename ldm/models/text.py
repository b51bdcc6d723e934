"""Text encoders: captions -> token states, their mask, and a pooled vector."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.layers import TransformerBlock


@cache
def bpe() -> Any:
    """CLIP's byte-pair encoding, whose vocabulary ships inside open_clip."""
    from open_clip.tokenizer import SimpleTokenizer  # here: it takes seconds, and only text needs it

    return SimpleTokenizer()


class Tokenizer:
    """Captions -> token ids of one length, whatever the captions: each in chunks with special tokens of their own.

    A caption that is too long for a chunk goes on in the next one, as AUTOMATIC1111's web UI has it; past the last it is
    cut. Cut captions are counted in `cut`, and told at the 1st, 10th, 100th ...

    Args:
        encode: caption -> ids, without special tokens.
        special: the ids of "": the last stands after a text, the others before it.
        pad: id of the padding.
        length: L of a chunk, special tokens included.
        chunks: C.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], special: Sequence[int], pad: int, length: int, chunks: int = 1
    ) -> None:
        self.encode = lru_cache(2**16)(encode)  # of a small data set, every epoch but the first finds its captions here
        self.special, self.pad = list(special), pad
        self.length, self.chunks = length, chunks
        self.seen = self.cut = 0
        if length <= len(special) or chunks < 1:
            raise UserError(f"length={length}, chunks={chunks}: give a length above {len(special)} and 1 chunk or more")

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (B, C, L) int64 and mask (B, C, L) bool, True on text and special tokens."""
        ids = torch.full((len(captions), self.chunks, self.length), self.pad, dtype=torch.int64, device="cpu")
        mask = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
        room = self.length - len(self.special)
        for i, caption in enumerate(captions):
            row = self.encode(caption)
            self._count(caption, len(row), room * self.chunks)
            for chunk in range(self.chunks):
                part = [*self.special[:-1], *row[chunk * room : (chunk + 1) * room], *self.special[-1:]]
                ids[i, chunk, : len(part)] = torch.tensor(part)
                mask[i, chunk, : len(part)] = True
        return ids, mask

    def _count(self, caption: str, tokens: int, room: int) -> None:
        self.seen += 1
        if tokens > room:
            self.cut += 1
            if str(self.cut).strip("0") == "1":
                warnings.warn(
                    f"{self.cut:,} of {self.seen:,} captions so far were longer than {room} tokens and are cut, such as "
                    f"{caption[:40]!r} with {tokens}",
                    stacklevel=2,
                )


class CachedText(nn.Module):
    """Stands in for the frozen text encoder whose work lies in a latent cache: of all captions it knows only "".

    Args:
        tokens, mask, vector: (L, D), (L,) and (V,), the encoding of "".
        digest: of the weights of the encoder that made the cache.
    """

    def __init__(self, tokens: Tensor, mask: Tensor, vector: Tensor, digest: str) -> None:
        super().__init__()
        for name, part in {"tokens": tokens.float(), "mask": mask, "vector": vector.float()}.items():
            self.register_buffer(name, part[None], persistent=False)  # the cache keeps them
        self.digest = digest

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """As TransformerText's. Raises UserError for captions that say something."""
        if any(captions):
            raise UserError(
                f"caption {next(filter(None, captions))!r} has to be encoded, but this run reads encoded text from its "
                "cache and has no text encoder: choose the model/conditioner that the cache was encoded with"
            )
        n = len(captions)
        return self.tokens.expand(n, -1, -1), self.mask.expand(n, -1), self.vector.expand(n, -1)


class TransformerText(nn.Module):
    """A bidirectional transformer trained together with the denoiser, as in the LDM paper's text-to-image model.

    Tokens are CLIP's byte-pair encoding; its vocabulary ships inside open_clip. A caption past `context_length` tokens
    is cut, its last token kept as the end-of-text token.

    Args:
        width: of the token states (D) and of the pooled vector.
        layers, heads: of the transformer.
        context_length: L, start and end tokens included.
        embed_width: width of the token embedding before it is projected to `width` (ALBERT's factorization): the
            vocabulary of 49,408 is most of a small model's weights. None: `width`, without a projection.
        pooled_gain: initial root mean square of the pooled vector. Above 1 its words are heard sooner beside the noise
            level in the backbone's embedding: a small model that is trained for minutes wants about 4. None: no vector.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context_length: int = 77,
        embed_width: int | None = None,
        pooled_gain: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.tokenizer = Tokenizer(bpe().encode, [bpe().sot_token_id, bpe().eot_token_id], 0, context_length)
        self.embed = nn.Embedding(bpe().vocab_size, embed_width or width)
        self.project = nn.Linear(embed_width, width, bias=False) if embed_width else nn.Identity()
        self.position = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, width // heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pool_norm = None if pooled_gain is None else nn.LayerNorm(width)
        if self.pool_norm is not None and pooled_gain is not None:
            nn.init.constant_(self.pool_norm.weight, pooled_gain)
        if (
            embed_width is None
        ):  # else unit normal: a state begins as its token, not as what the first layers make of it
            nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64, padded with 0, and mask (B, L) bool, True on start, text and end tokens."""
        ids, mask = self.tokenizer(captions)
        return ids[:, 0], mask[:, 0]

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, L, width), mask (B, L) bool, vector (B, width): the normalized mean of the states; or (B, 0)."""
        ids, mask = (t.to(self.position.device) for t in self.tokenize(captions))
        x = self.project(self.embed(ids)) + self.position
        for block in self.blocks:
            x = block(x, mask=mask)
        x, weight = self.norm(x), mask[:, :, None].to(x.dtype)
        if self.pool_norm is None:
            return x, mask, x.new_zeros(len(x), 0)
        return x, mask, self.pool_norm((x * weight).sum(dim=1) / weight.sum(dim=1))
