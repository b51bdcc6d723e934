"""Bytes of a sample -> a picture, or a BadSample that says why not."""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from ldm import keyed_random
from ldm.data.shards import BadSample
from ldm.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")  # named, or Pillow tries them all: its EPS reader starts Ghostscript
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 2**26
MAX_ASPECT = 20  # a picture of 1 x 20000 would be resized to a million columns
_ORIENTATION = 0x0112  # EXIF


class Frame(NamedTuple):
    """What is done to a picture, and to the maps that belong to it."""

    side: int  # pixels of the result's sides
    size: tuple[int, int]  # height and width that it is resized to
    crop: tuple[int, int]  # top and left of the crop in the resized picture
    mirrored: bool  # left to right, after the crop

    def __call__(self, x: Tensor) -> Tensor:
        """(C, H, W), uint8 or float, of any resolution -> (C, side, side)."""
        if self.size != x.shape[1:]:  # on uint8: Pillow's result up to rounding, three to five times faster
            x = functional.interpolate(x[None], self.size, mode="bicubic", antialias=True)[0]
        top, left = self.crop
        x = x[:, top : top + self.side, left : left + self.side]
        return (x.flip(2) if self.mirrored else x).contiguous()


class Picture(NamedTuple):
    """A decoded picture and what was done to it, as SDXL's size and crop conditioning wants it (Podell et al. 2023, 2.2)."""

    pixels: Tensor  # (3, side, side) uint8
    size: tuple[int, int]  # height and width before resizing
    frame: Frame


@dataclass
class DecodeImage:
    """Encoded picture -> RGB: short side resized to `side` (bicubic, antialiased), then a square crop.

    EXIF rotation is applied; transparency is laid on white.

    Args:
        side: pixels of the result's sides.
        random_crop: crop anywhere in place of the center, drawn from (seed, sample index).
        random_flip: mirror half of the samples, drawn likewise.
        scaled_decode: a JPEG may come at 1/2, 1/4 or 1/8 of its size while its short side stays at least so many times
            `side`; at 2 the pixels move by less than one gray level in the mean, at 1 by two. None: always whole.
        seed: of the draws.
    """

    side: int
    random_crop: bool = False
    random_flip: bool = False
    scaled_decode: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scaled_decode is not None and self.scaled_decode < 1:
            raise UserError(f"data.scaled_decode={self.scaled_decode}; give 1 or more (2 is nearly exact), or null")

    def __call__(self, data: bytes, index: int) -> Picture:
        """Raises BadSample: "image/empty", "/not an image", "/too large", "/too narrow", "/truncated"."""
        enough = None if self.scaled_decode is None else self.side * self.scaled_decode
        array, original = _decode(data, enough)
        pixels = torch.from_numpy(array).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        scale = self.side / min(height, width)
        size = (max(self.side, round(height * scale)), max(self.side, round(width * scale)))
        top, left = (self._place(extent - self.side, index, axis) for axis, extent in enumerate(size))
        frame = Frame(self.side, size, (top, left), self.mirrored(index))
        return Picture(frame(pixels), original, frame)

    def mirrored(self, index: int) -> bool:
        """Whether this sample is flipped, left to right."""
        return self.random_flip and keyed_random.uniform(self.seed, index, "flip") < 0.5

    def _place(self, spare: int, index: int, axis: int) -> int:
        if not self.random_crop:
            return spare // 2
        return int(keyed_random.uniform(self.seed, index, f"crop/{axis}") * (spare + 1))


def _decode(data: bytes, enough: float | None) -> tuple[np.ndarray, tuple[int, int]]:
    """(H, W, 3) uint8, and the picture's height and width, which those of the array may be a fraction of."""
    if not data:
        raise BadSample("image/empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadSample("image/too large") from None
    except Exception as error:  # Pillow's readers raise nearly anything on bad bytes
        raise BadSample("image/not an image") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSample("image/too large")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("image/too narrow")
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        if image.format == "JPEG" and image.mode in ("RGB", "L") and not turned:
            return _jpeg(data, height, width, enough), (height, width)
        image = ImageOps.exif_transpose(image)
        return _rgb(image), (image.height, image.width)
    except Exception as error:  # the same
        raise BadSample("image/truncated") from error


def _jpeg(data: bytes, height: int, width: int, enough: float | None) -> np.ndarray:
    """libjpeg-turbo, without Pillow's copies. What it finds fault with is left to Pillow's judgment."""
    factor = 1 if enough is None else max(f for f in (1, 2, 4, 8) if f == 1 or min(height, width) >= f * enough)
    least = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:
        return _rgb(Image.open(io.BytesIO(data), formats=FORMATS))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips at 255
        gray = np.asarray(image).astype(np.float64) / 257
        return np.repeat(gray.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
