"""Pictures and captions as they come, and what is refused by which name."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.data.shards import BadSample
from ldm.data.transforms import DecodeImage
from ldm.errors import UserError


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def scene(width: int, height: int) -> Image.Image:
    """Smooth color with hard edges: where a filter rings, without noise that rounds differently at every pixel."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([np.sin(9 * x) + np.cos(7 * y), np.sin(5 * y), np.cos(8 * x + 3 * y)], 2) * 60 + 128
    pixels[height // 3 : height // 2, width // 3 : width // 2] = (250, 4, 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def corners(pixels: Tensor) -> list[list[int]]:
    return [pixels[:, y, x].tolist() for y in (0, -1) for x in (0, -1)]


@pytest.mark.parametrize("size", [(61, 37), (37, 61), (32, 32), (20, 16), (33, 90), (200, 90), (1, 1), (1, 20)])
def test_resize_and_crop_are_pillows_up_to_rounding(size: tuple[int, int]) -> None:
    image = scene(*size)
    scale = 32 / min(size)
    resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(int)
    got = DecodeImage(32)(encode(image), 0).pixels
    assert got.dtype == torch.uint8
    assert got.shape == (3, 32, 32)
    assert got.is_contiguous()
    difference = abs(got.permute(1, 2, 0).numpy() - expected)
    assert difference.max() <= 4  # the two clip to 0..255 between their passes, in another order
    assert difference.mean() < 0.03


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_a_jpeg_is_decoded_as_pillow_does(mode: str, options: dict[str, object]) -> None:
    data = encode(scene(150, 97).convert(mode), "JPEG", quality=80, **options)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert torch.equal(DecodeImage(97)(data, 0).pixels, expected.permute(2, 0, 1)[:, :, 26:123])


def test_size_and_crop_are_told() -> None:
    picture = DecodeImage(32)(encode(scene(90, 64)), 0)
    assert picture.size == (64, 90)
    assert picture.frame.crop == (0, 6)  # of 32 x 45
    turned = Image.Exif()
    turned[0x0112] = 6
    assert DecodeImage(32)(encode(scene(90, 64), "JPEG", exif=turned), 0).size == (90, 64)


def test_random_crops_are_drawn_per_sample_and_told() -> None:
    data = encode(photo(48, 32))
    whole = torch.from_numpy(np.array(photo(48, 32))).permute(2, 0, 1)
    decode = DecodeImage(32, random_crop=True, seed=5)
    lefts = []
    for i in range(300):
        pixels, _, frame = decode(data, i)
        top, left = frame.crop
        assert top == 0
        assert torch.equal(pixels, whole[:, :, left : left + 32])
        lefts.append(left)
    assert set(lefts) == set(range(17))
    assert lefts == [decode(data, i).frame.crop[1] for i in range(300)]


def test_a_scale_below_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.scaled_decode=0.5; give 1 or more"):
        DecodeImage(32, scaled_decode=0.5)


def test_a_large_jpeg_read_at_a_fraction_stays_close() -> None:
    image = scene(512, 512)
    exact = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    decode = DecodeImage(32, scaled_decode=2)
    got = decode(encode(image, "JPEG", quality=95), 0).pixels.permute(1, 2, 0).numpy()
    assert abs(got - exact).mean() < 1


def test_modes() -> None:
    decode = DecodeImage(8)
    red = [255, 0, 0]
    assert corners(decode(encode(Image.new("P", (8, 8), 0).convert("P")), 0).pixels)[0] == [0, 0, 0]
    assert corners(decode(encode(Image.new("RGB", (8, 8), "red").quantize(4)), 0).pixels) == [red] * 4
    assert corners(decode(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), 0).pixels) == [[255, 255, 255]] * 4
    assert corners(decode(encode(Image.new("LA", (8, 8), (0, 0))), 0).pixels) == [[255, 255, 255]] * 4
    assert (
        corners(decode(encode(Image.new("RGB", (8, 8), "red"), transparency=(255, 0, 0)), 0).pixels) == [[255] * 3] * 4
    )
    assert corners(decode(encode(Image.new("L", (8, 8), 77)), 0).pixels) == [[77] * 3] * 4
    assert corners(decode(encode(Image.new("1", (8, 8), 1)), 0).pixels) == [[255] * 3] * 4
    assert corners(decode(encode(Image.fromarray(np.full((8, 8), 200 * 257, np.uint16))), 0).pixels) == [[200] * 3] * 4
    cmyk = decode(encode(Image.new("RGB", (8, 8), (250, 5, 5)).convert("CMYK"), "JPEG", quality=98), 0).pixels
    assert all(abs(a - b) < 6 for corner in corners(cmyk) for a, b in zip(corner, [250, 5, 5], strict=True))


def test_exif_rotation() -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste((0, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the dark corner goes from top left to top right
    got = corners(DecodeImage(16)(encode(image, "PNG", exif=exif), 0).pixels)
    assert got == [[255] * 3, [0] * 3, [255] * 3, [255] * 3]


def test_flip_is_drawn_per_sample() -> None:
    data = encode(photo(16, 16))
    plain = DecodeImage(16)(data, 0).pixels
    decode, again, other = (DecodeImage(16, random_flip=True, seed=seed) for seed in (5, 5, 6))
    flips = [torch.equal(decode(data, i).pixels, plain.flip(2)) for i in range(200)]
    assert all(torch.equal(decode(data, i).pixels, plain.flip(2) if flips[i] else plain) for i in range(200))
    assert 70 < sum(flips) < 130
    assert flips == [torch.equal(again(data, i).pixels, plain.flip(2)) for i in range(200)]
    assert flips != [torch.equal(other(data, i).pixels, plain.flip(2)) for i in range(200)]


def bomb(width: int, height: int) -> bytes:
    """The header of a PNG that claims this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image/empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "image/not an image"),
        (encode(photo(8, 8), "BMP"), "image/not an image"),
        (encode(photo(64, 64), "JPEG")[:2000], "image/truncated"),
        (encode(photo(64, 64))[:4000], "image/truncated"),
        (bomb(8200, 8200), "image/too large"),
        (bomb(13000, 13000), "image/too large"),
        (bomb(60000, 60000), "image/too large"),
        (bomb(1, 20000), "image/too narrow"),
    ],
)
def test_bad_pictures(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        DecodeImage(16)(data, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_bytes_give_a_picture_or_a_bad_sample(format: str) -> None:  # noqa: A002
    sound = encode(photo(24, 24), format)
    draw = np.random.default_rng(0)
    for _ in range(150):
        data = np.frombuffer(sound, np.uint8).copy()
        data[draw.integers(0, len(data), 5)] = draw.integers(0, 256, 5)
        with contextlib.suppress(BadSample):
            assert DecodeImage(16)(data.tobytes(), 0).pixels.shape == (3, 16, 16)
