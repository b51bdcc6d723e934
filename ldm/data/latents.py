"""The latent cache: shards whose samples hold posterior moments in place of the picture, and perhaps encoded captions.

    KEY.moments-<id>.npy   (F, 2z, h, w) float16, the mean and logvar of the posterior; F is 2 where the mirrored picture's follow
    KEY.tokens-<id>.npy    (n, D) float16, the caption's real tokens     } where text was encoded
    KEY.vector-<id>.npy    (V,) float16, its pooled vector               }
    KEY.txt, KEY.json      the source's; in the .json also CACHED, the picture's size and crop

<id> begins the digest of the network's weights: a sample says itself what encoded it, wherever its shard is moved. Beside the
shards lie `cache.json`, the Stamp, and the encoding of the empty caption. Sampling the posterior, flips, captions, filters
and scaling come after the cache.
"""

import io
import json
import math
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ldm.data.accounts import Tally
from ldm.data.decode import DecodeSample, Fields, passes
from ldm.data.schema import normalize, parse
from ldm.data.shards import BadSample
from ldm.errors import UserError
from ldm.files import aside

FORMAT = 1
CACHED = "cached"  # in a sample's .json: {"original_size": [height, width], "crop": [top, left]}


@dataclass(frozen=True)
class TextStamp:
    """Which text encoder, and its outputs' shape: L tokens of width D, pooled width V."""

    digest: str  # of its weights
    length: int
    width: int
    pooled: int

    def names(self) -> tuple[str, str]:
        """The members' extensions."""
        return f"tokens-{self.digest[:12]}.npy", f"vector-{self.digest[:12]}.npy"


@dataclass(frozen=True)
class Stamp:
    """What a cache holds and what made it."""

    first_stage: str  # digest of the encoder's weights
    side: int  # pixels of the pictures
    moments: tuple[int, int, int, int]  # F, 2z, h, w
    shards: int  # how many there are once all is encoded
    source: str  # digest of the source shards' names
    text: TextStamp | None

    def name(self) -> str:
        """The moments' extension."""
        return f"moments-{self.first_stage[:12]}.npy"

    def write(self, folder: Path) -> None:
        """folder/cache.json, whole at any moment; several ranks may write the same at once."""
        _put(folder / "cache.json", (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: str | Path, command: str = "ldm shards encode") -> "Stamp":
        """Raises UserError, which names the command that makes such a folder: not there, or not readable."""
        path = Path(folder) / "cache.json"
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise UserError(f"{path} is of another format than {FORMAT}: make it again with {command}")
            text = fields.pop("text")
            moments: Any = tuple(map(int, fields.pop("moments")))
            return cls(moments=moments, text=text and TextStamp(**text), **fields)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); make it with {command}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path} is damaged; make it again with {command}") from None


class DecodeLatents(DecodeSample):
    """What shards of a latent cache give: moments, caption, original_size, crop, and where text is cached text_tokens,
    text_mask, text_vector. The draws are those of live pictures: a sample is mirrored or not by the same number.

    Validation (`without_augmentation`) also takes shards of pictures, which are decoded as live ones.

    Args:
        folder: where cache.json is; the shards may be elsewhere.
        others: see DecodeSample. `scaled_decode` is for pictures in validation.

    Raises:
        UserError: the cache cannot give what the others ask for (here), or shards are of another cache (when reading).
    """

    def __init__(self, folder: str, side: int, **others: Any) -> None:
        super().__init__(side, **others)
        self.stamp = Stamp.read(folder)
        fit_for(self.stamp, folder, side, self.image.random_flip)
        if self.image.random_crop:
            raise UserError(f"data.decode.random_crop=true, but {folder} holds center crops: set it false")
        if self.stamp.text and list(self.captions.weights) != ["txt"]:
            raise UserError(
                f"data.decode.captions={self.captions.weights}, but {folder} holds encodings of txt: give {{txt: 1}}"
            )
        self.pictures = False

    def without_augmentation(self) -> Self:
        """The same samples each time: no flip."""
        out = super().without_augmentation()
        out.pictures = True
        return out

    def __call__(self, key: str, members: dict[str, bytes], index: int) -> Fields:
        """Raises BadSample: "latent/...", "text/...", and what DecodeSample raises."""
        name = self.stamp.name()
        if name not in members:
            if self.pictures and not any(extension.startswith("moments-") for extension in members):
                return super().__call__(key, members, index)
            raise UserError(
                f"sample {key} has no {name} but {', '.join(sorted(members))}: its shard is not of the cache that "
                "data.decode.folder names"
            )
        row = parse(members.get("json"))
        caption = self.captions(members, row, index)
        if self.filters:
            passes(self.filters, normalize(row) | {"key": key, "caption": caption})
        view = self.image.mirrored(index)
        moments = finite(from_npy(members[name], self.stamp.moments)[int(view)])
        text = unpack_text(self.stamp.text, members) if self.stamp.text else {}
        size, crop = cached_place(row)
        return {
            "moments": torch.from_numpy(moments.copy()),
            "caption": caption,
            "original_size": torch.tensor(size),
            "crop": torch.tensor(crop),
            **text,
            **{name: read(members, None) for name, read in self.fields.items()},
        }


def fit_for(stamp: Stamp, folder: str | Path, side: int, random_flip: bool) -> None:
    """Raises UserError where a cache holds pictures of another side, or none that are mirrored."""
    if stamp.side != side:
        raise UserError(f"{folder} was encoded at {stamp.side} px, data.side={side}: set data.side={stamp.side}")
    if random_flip and stamp.moments[0] != 2:
        raise UserError(
            f"random_flip=true, but {folder} holds no mirrored pictures: encode with `ldm shards encode --flip ...`, "
            "or set it false"
        )


def to_npy(array: np.ndarray) -> bytes:
    """float16, as numpy.save writes it."""
    assert array.dtype == np.float16
    return _header(array.shape) + array.astype("<f2").tobytes()


def from_npy(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """to_npy's array, read-only. Raises BadSample "latent/wrong shape or type" for any other."""
    header = _header(shape)  # compared, not parsed: numpy.load takes ten times as long
    if len(data) != len(header) + 2 * math.prod(shape) or not data.startswith(header):
        raise BadSample("latent/wrong shape or type")
    return np.frombuffer(data, "<f2", offset=len(header)).reshape(shape)


def finite(array: np.ndarray) -> np.ndarray:
    """The float16 array. Raises BadSample "latent/not finite"."""
    # an exponent of ones is infinite or NaN; numpy.isfinite takes six times as long
    if (array.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
        raise BadSample("latent/not finite")
    return array


def unpack_text(text: TextStamp, members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """text_tokens (L, D) and text_vector (V,) float16, text_mask (L,) bool.

    Raises:
        BadSample: "text/missing", "latent/wrong shape or type", "latent/not finite".
    """
    tokens_name, vector_name = text.names()
    if tokens_name not in members or vector_name not in members:
        raise BadSample("text/missing")
    data = members[tokens_name]
    n = (len(data) - len(_header((1, text.width)))) // (2 * text.width)
    if not 0 < n <= text.length:
        raise BadSample("latent/wrong shape or type")
    tokens = torch.zeros(text.length, text.width, dtype=torch.float16)
    tokens.numpy()[:n] = finite(from_npy(data, (n, text.width)))
    vector = finite(from_npy(members[vector_name], (text.pooled,))).copy()
    return {
        "text_tokens": tokens,
        "text_mask": torch.arange(text.length) < n,
        "text_vector": torch.from_numpy(vector),
    }


def pack_text(text: TextStamp, tokens: Tensor, mask: Tensor, vector: Tensor) -> dict[str, bytes]:
    """One caption's encoding, (L, D), (L,), (V,) -> its members. Raises BadSample "latent/not finite"."""
    assert mask.sum() == mask.cummin(0).values.sum() > 0, "real tokens come first"
    parts = (tokens[mask], vector)
    return {name: to_npy(finite(part.half().cpu().numpy())) for name, part in zip(text.names(), parts, strict=True)}


def write_null(folder: Path, members: Mapping[str, bytes]) -> None:
    """The encoding of the empty caption, as pack_text gives it, into files beside the stamp."""
    for name, data in members.items():
        _put(folder / f"null.{name}", data)


def read_null(folder: str | Path, text: TextStamp) -> dict[str, Tensor]:
    """As unpack_text. Raises UserError: not there, or damaged."""
    try:
        return unpack_text(text, {name: (Path(folder) / f"null.{name}").read_bytes() for name in text.names()})
    except (OSError, BadSample) as error:
        raise UserError(f"{folder}: the encoding of the empty caption cannot be read ({error}); encode again") from None


class CacheShard:
    """Writes one shard of a cache: NNNNN.tar and NNNNN_stats.json. It is complete or not there: all is written aside and
    renamed, the tar last. The same samples give the same bytes.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path, self.stats = folder / f"{number:05d}.tar", folder / f"{number:05d}_stats.json"

    def tally(self) -> Tally | None:
        """What a finished shard was made of; None: it is not finished."""
        return Tally.from_report(json.loads(self.stats.read_text())) if self.path.exists() else None

    def write(self, samples: Iterable[tuple[str, Mapping[str, bytes]]], tally: Tally) -> None:
        """samples: (key, members); tally: what was written and what was dropped, once the last sample is there."""
        partial = self.path.with_suffix(".tar.partial")
        with tarfile.open(partial, "w") as tar:
            for key, members in samples:
                for extension, data in members.items():
                    header = tarfile.TarInfo(f"{key}.{extension}")  # of 1970 and nobody
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
        total = tally.delivered + tally.dropped.total()
        stats = {"count": total, "successes": tally.delivered, "failed_to_resize": 0, **tally.report()}
        _put(self.stats, (json.dumps(stats) + "\n").encode())
        partial.rename(self.path)


def _put(path: Path, data: bytes) -> None:
    with aside(path) as partial:
        partial.write_bytes(data)


def cached_place(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Original size (height, width) and crop (top, left). Raises BadSample "latent/no size and crop"."""
    place = row.get(CACHED)
    parts: Any = (place.get("original_size"), place.get("crop")) if isinstance(place, dict) else ()
    if not parts or any(type(p) is not list or len(p) != 2 or {type(v) for v in p} != {int} for p in parts):
        raise BadSample("latent/no size and crop")
    return parts


@lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return file.getvalue()
