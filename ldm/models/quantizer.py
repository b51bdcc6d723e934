"""Vector quantization with a codebook (van den Oord et al. 2017), learned by gradient or as moving averages.

Shapes: vectors (B, D, h, w); codes (B, h, w) int64 in [0, K); codebook (K, D).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom


class Quantized(NamedTuple):
    """latents: (B, D, h, w), with the gradient passed straight through; codes: (B, h, w); penalty: (B,) codebook loss."""

    latents: Tensor
    codes: Tensor
    penalty: Tensor


class VectorQuantizer(nn.Module):
    """Each vector becomes the nearest row of the codebook.

    The penalty is ||sg(z) - e||^2 + beta ||z - sg(e)||^2 averaged over elements (eq. 3); with `decay` the first term is
    left out, and the rows are moving averages of the vectors assigned to them (appendix A.1).

    Args:
        codes: K, at least 2.
        width: D.
        beta: weight of the commitment; 0.25 in the published models.
        decay: of the moving averages in (0, 1); None: the codebook is learned by gradient.
        revive_below: a row whose moving share of the vectors falls below this fraction of 1 / K is put on a vector of
            the batch at hand, drawn at random; 0: never. Needs `decay`.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self, codes: int, width: int, beta: float = 0.25, decay: float | None = None, revive_below: float = 0.0
    ) -> None:
        super().__init__()
        if codes < 2 or width < 1:
            raise UserError(
                f"codebook: {codes} codes of width {width}; give at least 2 codes and a width of at least 1"
            )
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"codebook: decay is {decay}; give a number in (0, 1), or null to learn it by gradient")
        if revive_below and decay is None:
            raise UserError("codebook: revive_below counts by the moving averages; give a decay too, such as 0.99")
        self.codes, self.width, self.beta = codes, width, beta
        self.decay, self.revive_below = decay, revive_below
        self.learning = decay is not None
        rows = torch.empty(codes, width).uniform_(-1 / codes, 1 / codes)
        self.embedding = nn.Module()  # keeps CompVis' name: embedding.weight
        if decay is None:
            self.embedding.weight = nn.Parameter(rows)
        else:
            self.embedding.register_buffer("weight", rows)
            self.register_buffer("share", torch.full((codes,), 1 / codes))
            self.register_buffer("total", rows / codes)

    def nearest(self, vectors: Tensor) -> Tensor:
        """(B, D, h, w) -> codes (B, h, w)."""
        rows = vectors.float().movedim(1, -1).flatten(0, 2)
        book = self.embedding.weight.float()
        norms = book.square().sum(dim=1)  # |z|^2 is the same for all rows
        with torch.autocast(rows.device.type, enabled=False):  # neighbors are close: bfloat16 would choose others
            # in parts: all distances at once would be B h w K numbers
            codes = torch.cat([(norms - 2 * part @ book.T).argmin(dim=1) for part in rows.split(4096)])
        return codes.unflatten(0, (vectors.shape[0], *vectors.shape[2:]))

    def lookup(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) -> (B, D, h, w)."""
        return F.embedding(codes, self.embedding.weight).movedim(-1, 1)

    def forward(self, vectors: Tensor) -> Quantized:
        vectors = vectors.float()
        codes = self.nearest(vectors)
        rows = self.lookup(codes)
        penalty = self.beta * (vectors - rows.detach()).square()
        if self.decay is None:
            penalty = penalty + (vectors.detach() - rows).square()
        return Quantized(vectors + (rows - vectors).detach(), codes, penalty.mean(dim=(1, 2, 3)))

    @torch.no_grad()
    def learn(self, vectors: Tensor, codes: Tensor, random: KeyedRandom) -> None:
        """Moves the averages by one batch, over all ranks; nothing where there are none, or they are frozen.

        Args:
            vectors, codes: as `forward` had and gave them.
            random: of the batch; a row is revived with the vector that draws the lowest number.
        """
        if not self.learning or self.decay is None:
            return
        rows = vectors.float().movedim(1, -1).flatten(0, 2)
        count = torch.bincount(codes.flatten(), minlength=self.codes).float()
        total = torch.zeros_like(self.total).index_add_(0, codes.flatten(), rows)
        size = torch.tensor(float(len(rows)), device=rows.device)
        candidates = self._candidates(rows, random)
        if dist.is_initialized():
            for part in (count, total, size):
                dist.all_reduce(part)
        self.share.lerp_(count / size, 1 - self.decay)
        self.total.lerp_(total / size, 1 - self.decay)
        if self.revive_below:
            dead = self.share < self.revive_below / self.codes
            fresh = candidates[torch.arange(self.codes, device=rows.device) % len(candidates)]
            self.share[dead] = 1 / self.codes
            self.total[dead] = fresh[dead] / self.codes
        self.embedding.weight.copy_(self.total / self.share.clamp_min(1e-5 / self.codes)[:, None])

    def _candidates(self, rows: Tensor, random: KeyedRandom) -> Tensor:
        """One vector of each sample of the global batch, in the order of the samples' draws: (B, D)."""
        per_sample = rows.unflatten(0, (len(random.index), -1))  # (B, h * w, D)
        where, order = random.uniform("revive_where"), random.uniform("revive_order")
        picked = per_sample[torch.arange(len(where)), (where * per_sample.shape[1]).long()]
        if dist.is_initialized():
            world = dist.get_world_size()
            parts = [[torch.empty_like(part) for _ in range(world)] for part in (picked, order)]
            for gathered, part in zip(parts, (picked, order), strict=True):
                dist.all_gather(gathered, part.contiguous())
            picked, order = (torch.cat(gathered) for gathered in parts)
        return picked[order.argsort()]


def usage(counts: Tensor) -> dict[str, Tensor]:
    """What a codebook is used for. counts: (K,) how often each code was chosen.

    `usage`: share of the codes chosen at all; `perplexity`: exp of the entropy in nats, K when all are as likely.
    """
    share = counts.double() / counts.sum()
    return {"usage": (counts > 0).double().mean(), "perplexity": torch.special.entr(share).sum().exp()}
