"""One set of names for what LAION's subsets and img2dataset call by many (similarity, AESTHETIC_SCORE, url/URL ...)."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypedDict

from ldm.data.shards import BadSample

MAX_JSON_BYTES = 2**20


class Record(TypedDict, total=False):
    """What is known of a sample. A field that is absent, null, NaN or of the wrong kind is not there."""

    key: str  # the sample's name in its shard
    caption: str
    url: str
    width: float  # pixels of the original picture, before img2dataset resized it
    height: float
    similarity: float  # CLIP's cosine between picture and caption
    aesthetic: float  # the LAION predictor's score, about 1..10
    pwatermark: float  # probability in [0, 1]
    punsafe: float  # probability in [0, 1]
    nsfw: str  # LAION-400M: UNLIKELY, UNSURE, NSFW
    license: str  # "?" where unknown
    language: str
    hash: str


# canonical name -> names in use, lower case, best first (LAION-400M, -2B, -aesthetics, -COCO; img2dataset)
NAMES: Mapping[str, tuple[str, ...]] = {
    "caption": ("caption", "text", "top_caption"),
    "url": ("url",),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "similarity": ("similarity", "clip_similarity_vitb32", "clip_similarity"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2", "aesthetics"),
    "pwatermark": ("pwatermark", "p_watermark", "watermark_score"),
    "punsafe": ("punsafe", "p_unsafe", "unsafe_score"),
    "nsfw": ("nsfw",),
    "license": ("license", "licence"),
    "language": ("language", "lang"),
    "hash": ("hash", "sha256", "md5"),
}
_KINDS = Record.__annotations__


def normalize(row: Mapping[str, Any]) -> Record:
    """A row of metadata under any of the names, in any case -> the Record it is."""
    lower = {str(name).lower(): value for name, value in row.items()}
    record = Record()
    for name, aliases in NAMES.items():
        for alias in aliases:
            value = _number(lower.get(alias)) if _KINDS[name] is float else _text(lower.get(alias))
            if value is not None:
                record[name] = value  # type: ignore[literal-required]  # of NAMES
                break
    return record


def parse(data: bytes | None) -> dict[str, Any]:
    """A sample's .json member; {} where there is none.

    Raises:
        BadSample: "json/too long", "/unreadable", "/not an object".
    """
    if data is None:
        return {}
    if len(data) > MAX_JSON_BYTES:
        raise BadSample("json/too long")
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSample("json/unreadable") from None
    if not isinstance(row, dict):
        raise BadSample("json/not an object")
    return row


def _number(value: Any) -> float | None:
    """Numbers arrive as text too, from CSV files."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str | None:
    """LAION's hash is an integer."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip() or None
