"""A sample's members -> the fields of a batch: what is known of it, the filters, the caption, then the picture."""

import io
from collections.abc import Callable, Mapping
from copy import copy
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ldm import keyed_random
from ldm.data.filters import Filter
from ldm.data.schema import Record, normalize, parse
from ldm.data.shards import BadSample
from ldm.data.transforms import EXTENSIONS, DecodeImage, Frame, Picture
from ldm.errors import UserError

MAX_CAPTION_BYTES = 2**16
FILTERED = "filter/"  # such drops are wanted: they do not count against the budget

Fields = dict[str, Any]  # name of a batch key -> this sample's tensor or string
Decode = Callable[[str, dict[str, bytes], int], Fields]  # (key, {extension: bytes}, index) -> Fields; raises BadSample
Field = Callable[[Mapping[str, bytes], Frame | None], Tensor]  # (members, the picture's or None) -> one field


class Captions:
    """Which of a sample's captions to train on, drawn for each (seed, sample index).

    Args:
        weights: name -> weight. A name is a member's extension (txt) or a field of the .json (blip_caption). The draw is
            among those that the sample has; one without a weight (None) is left out.
        seed: of the draw.
    """

    def __init__(self, weights: Mapping[str, float | None], seed: int) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight is not None}
        if not self.weights or min(self.weights.values()) <= 0:
            raise UserError(f"data.captions={dict(weights)}; give at least one name, each with a weight above 0")
        self.seed = seed

    def __call__(self, members: Mapping[str, bytes], row: Mapping[str, Any], index: int) -> str:
        """Raises BadSample: "caption/missing", "/too long", "/not UTF-8", "/empty"."""
        there = {name: w for name, w in self.weights.items() if name in members or isinstance(row.get(name), str)}
        if not there:
            raise BadSample("caption/missing")
        name = next(iter(there)) if len(there) == 1 else self._draw(there, index)
        data = members[name] if name in members else row[name].encode("utf-8", "replace")
        if len(data) > MAX_CAPTION_BYTES:
            raise BadSample("caption/too long")
        try:
            caption = data.decode().strip()
        except UnicodeDecodeError:
            raise BadSample("caption/not UTF-8") from None
        if not caption:
            raise BadSample("caption/empty")
        return caption

    def _draw(self, weights: Mapping[str, float], index: int) -> str:
        rest = keyed_random.uniform(self.seed, index, "caption") * sum(weights.values())
        for name, weight in weights.items():
            rest -= weight
            if rest < 0:
                return name
        return name


class ClassNumber:
    """A sample's class, out of its .cls member: a number in text, as webdataset's ImageNet has it.

    Args:
        classes: how many; a number is in 0 .. classes - 1.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, members: Mapping[str, bytes], frame: Frame | None) -> Tensor:
        """() int64. Raises BadSample: "label/missing", "/not a number", "/out of range"."""
        if "cls" not in members:
            raise BadSample("label/missing")
        try:
            label = int(members["cls"])
        except ValueError:
            raise BadSample("label/not a number") from None
        if not 0 <= label < self.classes:
            raise BadSample("label/out of range")
        return torch.tensor(label)


class DepthMap:
    """The depth of the whole picture as it is displayed, out of the .depth.npy member: (h, w) or (1, h, w) numbers in any
    unit and of any resolution. It is resized, cropped and mirrored as the picture is.
    """

    def __call__(self, members: Mapping[str, bytes], frame: Frame | None) -> Tensor:
        """(1, side, side) float32. Raises BadSample: "depth/missing", "/unreadable", "/wrong shape or type", "/not finite"."""
        if frame is None:
            raise UserError("data.decode.fields has a depth map, which goes with pictures: a latent cache has none")
        if "depth.npy" not in members:
            raise BadSample("depth/missing")
        try:
            depth = np.load(io.BytesIO(members["depth.npy"]), allow_pickle=False)
        except Exception as error:  # NumPy's reader raises nearly anything on bad bytes
            raise BadSample("depth/unreadable") from error
        if not isinstance(depth, np.ndarray) or depth.dtype.kind not in "fiu" or depth.size == 0:
            raise BadSample("depth/wrong shape or type")
        if depth.ndim not in (2, 3) or depth.size != depth.shape[-2] * depth.shape[-1]:
            raise BadSample("depth/wrong shape or type")
        depth = depth.astype(np.float32).reshape(1, *depth.shape[-2:])
        if not np.isfinite(depth).all():
            raise BadSample("depth/not finite")
        return frame(torch.from_numpy(depth))


class DecodeSample:
    """What shards of pictures and captions give: image, caption, original_size, crop, and further fields.

    Args:
        side, random_crop, random_flip, scaled_decode: see DecodeImage.
        captions: see Captions.
        filters: name -> filter, asked in this order before the picture is decoded.
        seed: of the draws.
        fields: batch key -> what reads it, of every sample: {label: ClassNumber, depth: DepthMap}.
    """

    def __init__(
        self,
        side: int,
        random_crop: bool = False,
        random_flip: bool = False,
        scaled_decode: float | None = None,
        captions: Mapping[str, float] = MappingProxyType({"txt": 1.0}),
        filters: Mapping[str, Filter] = MappingProxyType({}),
        seed: int = 0,
        fields: Mapping[str, Field] = MappingProxyType({}),
    ) -> None:
        self.image = DecodeImage(side, random_crop, random_flip, scaled_decode, seed)
        self.captions, self.filters, self.fields = Captions(captions, seed), dict(filters), dict(fields)

    def without_augmentation(self) -> Self:
        """The same pictures each time: center crop, no flip."""
        out = copy(self)
        out.image = DecodeImage(self.image.side, scaled_decode=self.image.scaled_decode)
        return out

    def __call__(self, key: str, members: dict[str, bytes], index: int) -> Fields:
        """Raises BadSample, of a filter too: "filter/<name>"."""
        row = parse(members.get("json"))
        caption = self.captions(members, row, index)
        record = normalize(row)
        passes(self.filters, record | {"key": key, "caption": caption})
        picture = decode_picture(self.image, members, record, index)
        return {
            "image": picture.pixels,
            "caption": caption,
            "original_size": torch.tensor(picture.size),
            "crop": torch.tensor(picture.frame.crop),
            **{name: read(members, picture.frame) for name, read in self.fields.items()},
        }


def decode_picture(image: DecodeImage, members: Mapping[str, bytes], record: Record, index: int) -> Picture:
    """A sample's picture; its size is the one before img2dataset resized it, where the record knows that.

    Raises:
        BadSample: "image/missing", and what `image` raises.
    """
    data = next((members[extension] for extension in EXTENSIONS if extension in members), None)
    if data is None:
        raise BadSample("image/missing")
    picture = image(data, index)
    if "height" in record and "width" in record:
        return picture._replace(size=(int(record["height"]), int(record["width"])))
    return picture


def passes(filters: Mapping[str, Filter], record: Any) -> None:
    """Raises BadSample "filter/<name>" for the first filter that does not keep the sample."""
    for name, keep in filters.items():
        if not keep(record):
            raise BadSample(FILTERED + name)
