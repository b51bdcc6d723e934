"""Bytes of a shard -> a picture and its caption, or a BadSample that says why not."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from ldm.data.shards import BadSample
from ldm.keyed_random import KeyedRandom

FORMATS = ("JPEG", "PNG", "WEBP")  # named, or Pillow tries them all: its EPS reader starts Ghostscript
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 2**26
MAX_ASPECT = 20  # a picture of 1 x 20000 would be resized to a million columns
MAX_CAPTION_BYTES = 2**16


class DecodeImage:
    """Encoded picture -> uint8 (3, side, side) RGB: short side resized to `side` (bicubic, antialiased), center crop.

    EXIF rotation is applied; transparency is laid on white. With `random_flip` half of the samples are mirrored, drawn
    from (seed, sample index).
    """

    def __init__(self, side: int, random_flip: bool = False, seed: int = 0) -> None:
        self.side = side
        self.random_flip = random_flip
        self.seed = seed

    def __call__(self, data: bytes, index: int) -> Tensor:
        """Raises BadSample: "image/empty", "/not an image", "/too large", "/too narrow", "/truncated"."""
        pixels = torch.from_numpy(_decode(data, 2 * self.side)).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        scale = self.side / min(height, width)
        size = (max(self.side, round(height * scale)), max(self.side, round(width * scale)))
        if size != (height, width):  # on uint8: Pillow's result up to rounding, three to five times faster
            pixels = functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        pixels = pixels[:, top : top + self.side, left : left + self.side]
        if self.random_flip and KeyedRandom(self.seed, torch.tensor([index])).uniform("flip").item() < 0.5:
            pixels = pixels.flip(2)
        return pixels.contiguous()


def decode_caption(data: bytes | None) -> str:
    """Raises BadSample: "caption/missing", "/too long", "/not UTF-8", "/empty"."""
    if data is None:
        raise BadSample("caption/missing")
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSample("caption/too long")
    try:
        caption = data.decode().strip()
    except UnicodeDecodeError:
        raise BadSample("caption/not UTF-8") from None
    if not caption:
        raise BadSample("caption/empty")
    return caption


def decode_sample(members: dict[str, bytes], decode: DecodeImage, index: int) -> tuple[Tensor, str]:
    """{extension: bytes} -> (3, side, side) uint8 and the caption. Raises BadSample."""
    caption = decode_caption(members.get("txt"))  # first: it costs nothing
    data = next((members[extension] for extension in EXTENSIONS if extension in members), None)
    if data is None:
        raise BadSample("image/missing")
    return decode(data, index), caption


def _decode(data: bytes, enough: int) -> np.ndarray:
    """(H, W, 3) uint8. A JPEG may come at 1/2, 1/4 or 1/8 of its size while both sides stay at least `enough`."""
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
        image.draft(None, (enough, enough))
        ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)
    except Exception as error:  # the same
        raise BadSample("image/truncated") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips at 255
        gray = np.asarray(image).astype(np.float64) / 257
        return np.repeat(gray.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
