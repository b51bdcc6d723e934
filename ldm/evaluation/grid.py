"""A grid of pictures with their captions, as one picture."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_CELL = 128  # pictures are enlarged to about this many pixels
_GAP = 8
_FONT_SIZE = 11
_LINE = 14


def picture_grid(images: Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """images: (N, 3, H, W) uint8; captions: N, written below the pictures, wrapped, at most four lines.

    Small pictures are enlarged by a whole factor, so that each pixel stays a square.
    """
    n, _, height, width = images.shape
    factor = max(1, round(_CELL / max(height, width)))
    cell_width, cell_height = width * factor, height * factor
    font = ImageFont.load_default(_FONT_SIZE)
    lines = [_wrap(caption, cell_width) for caption in captions]
    text_height = _LINE * max((len(text) for text in lines), default=0) + 2
    rows = -(-n // columns)
    columns = min(columns, n)
    grid = Image.new(
        "RGB", (columns * (cell_width + _GAP) + _GAP, rows * (cell_height + text_height + _GAP) + _GAP), "white"
    )
    draw = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, lines, strict=True)):
        x = _GAP + i % columns * (cell_width + _GAP)
        y = _GAP + i // columns * (cell_height + text_height + _GAP)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        grid.paste(picture.resize((cell_width, cell_height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + cell_width, y + cell_height), outline="#bbbbbb")
        for j, line in enumerate(text):
            draw.text((x, y + cell_height + 2 + j * _LINE), line, font=font, fill="#222222")
    return grid


def _wrap(caption: str, width: int) -> list[str]:
    return textwrap.wrap(caption, max(8, round(width / 5.8)), max_lines=4, placeholder=" …")
