import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluation.grid import picture_grid


def pictures(n: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width", "factor"), [(32, 32, 4), (64, 32, 2), (256, 200, 1)])
def test_each_picture_stands_in_its_cell_enlarged_by_a_whole_factor(height: int, width: int, factor: int):
    images = pictures(5, height, width)
    grid = np.asarray(picture_grid(images, [""] * 5, columns=3))
    step = width * factor + 8, height * factor + 2 + 8  # with no caption, two pixels of text
    assert grid.shape == (2 * step[1] + 8, 3 * step[0] + 8, 3)
    for i, image in enumerate(images):
        x, y = 8 + i % 3 * step[0], 8 + i // 3 * step[1]
        cell = grid[y : y + height * factor, x : x + width * factor]
        enlarged = image.permute(1, 2, 0).numpy().repeat(factor, axis=0).repeat(factor, axis=1)
        assert (cell == enlarged).all()


def test_captions_are_written_below_and_at_most_four_lines_long():
    images = pictures(2, 32, 32)
    short, long = picture_grid(images, ["a", "b"], 2), picture_grid(images, ["word " * 100, "b"], 2)
    assert isinstance(short, Image.Image)
    assert long.height == short.height + 3 * 14
    below = np.asarray(long)[8 + 128 + 2 : -9, 8 : 8 + 128]
    assert (below < 100).any()


def test_fewer_pictures_than_columns_make_a_narrow_grid():
    assert picture_grid(pictures(2, 32, 32), ["a", "b"], columns=8).width == 2 * 136 + 8


def test_a_caption_for_every_picture():
    with pytest.raises(ValueError, match="shorter"):
        picture_grid(pictures(2, 32, 32), ["a"], columns=2)
