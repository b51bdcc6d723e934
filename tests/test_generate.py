import pytest
import torch
from torch import Tensor

from ldm.evaluation.generate import generate

CAPTIONS = [f"caption {i}" for i in range(7)]


def sample(captions: list[str], index: Tensor) -> Tensor:
    """A picture whose gray level is its index, checked against its caption."""
    assert captions == [CAPTIONS[i] for i in index.tolist()]
    return (index.float() / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_pictures_do_not_depend_on_the_batch_size(batch_size: int):
    parts = list(generate(sample, CAPTIONS, batch_size))
    images = torch.cat([images for _, images in parts])
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0, 0, 0], torch.arange(7, dtype=torch.uint8))
    assert [i for rows, _ in parts for i in range(7)[rows]] == list(range(7))
    assert all(len(images) == rows.stop - rows.start <= batch_size for rows, images in parts)


def test_nothing_for_no_captions():
    assert list(generate(sample, [], 4)) == []
