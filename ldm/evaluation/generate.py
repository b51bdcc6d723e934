"""Generation for evaluation: a picture is a function of its caption, its index and the seed alone."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldm.batch import to_uint8

Sample = Callable[[list[str], Tensor], Tensor]  # captions, index (B,) -> images (B, 3, H, W) in [-1, 1]


def generate(sample: Sample, captions: Sequence[str], batch_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields (which captions, their pictures (B, 3, H, W) uint8 on the CPU), in order."""
    for start in range(0, len(captions), batch_size):
        rows = slice(start, min(start + batch_size, len(captions)))
        images = sample(list(captions[rows]), torch.arange(rows.start, rows.stop))
        yield rows, to_uint8(images).cpu()
