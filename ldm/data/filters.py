"""Filters on what is known of a sample. Each is given a Record and says whether to keep it; each says what a value that is
missing means, because LAION's subsets lack different fields.

A config names them: `data.filters: {aesthetic: {...}}`, and their drops are counted as filter/aesthetic.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ldm.data.schema import NAMES, Record
from ldm.errors import UserError

Filter = Callable[[Record], bool]


class Between:
    """Keeps `low` <= field <= `high`; a bound that is None does not bind.

    Args:
        field: of Record, a number: aesthetic, similarity, pwatermark, punsafe, width, height.
        keep_missing: whether a sample without the field stays.
    """

    def __init__(self, field: str, keep_missing: bool, low: float | None = None, high: float | None = None) -> None:
        self.field, self.keep_missing = _known(field), keep_missing
        if (low is None and high is None) or (low is not None and high is not None and low > high):
            raise UserError(f"filter on {field}: low={low}, high={high}; give one bound, or low <= high")
        self.low = float("-inf") if low is None else low
        self.high = float("inf") if high is None else high

    def __call__(self, record: Record) -> bool:
        value: Any = record.get(self.field)
        return self.keep_missing if value is None else self.low <= value <= self.high


class SmallestSide:
    """Keeps pictures whose original shorter side has `minimum` pixels or more (SD 1.2: 512, SD 1.1's second part: 1024)."""

    def __init__(self, minimum: int, keep_missing: bool) -> None:
        self.minimum, self.keep_missing = minimum, keep_missing

    def __call__(self, record: Record) -> bool:
        if "width" not in record or "height" not in record:
            return self.keep_missing
        return min(record["width"], record["height"]) >= self.minimum


class CaptionLength:
    """Keeps captions of `low`..`high` characters; the caption is the one that the step would train on."""

    def __init__(self, low: int, high: int) -> None:
        if not 0 <= low <= high:
            raise UserError(f"filter on the caption's length: low={low}, high={high}; give 0 <= low <= high")
        self.low, self.high = low, high

    def __call__(self, record: Record) -> bool:
        return self.low <= len(record["caption"]) <= self.high


class CaptionWithout:
    """Drops captions that hold one of `words`, in any case (SD 2's filter_word_list)."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [word.casefold() for word in words]

    def __call__(self, record: Record) -> bool:
        caption = record["caption"].casefold()
        return not any(word in caption for word in self.words)


class OneOf:
    """Keeps samples whose field is one of `values`: language, license, nsfw."""

    def __init__(self, field: str, values: Collection[str], keep_missing: bool) -> None:
        self.field, self.values, self.keep_missing = _known(field), frozenset(values), keep_missing

    def __call__(self, record: Record) -> bool:
        value = record.get(self.field)
        return self.keep_missing if value is None else value in self.values


class NoneOf(OneOf):
    """Drops samples whose field is one of `values` (MLPerf drops license "?")."""

    def __call__(self, record: Record) -> bool:
        return self.keep_missing if record.get(self.field) is None else not super().__call__(record)


class NotListed(NoneOf):
    """Drops samples whose field stands in a file, one value a line: duplicates by key or hash, URLs that were withdrawn.

    `ldm shards check --duplicates FILE` writes such a list of keys.
    """

    def __init__(self, field: str, path: str, keep_missing: bool) -> None:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(
                f"filter on {field}: {path!r} cannot be read ({error.strerror}); give a text file"
            ) from None
        super().__init__(field, {line.strip() for line in lines if line.strip()}, keep_missing)


def _known(field: str) -> str:
    if field not in (*NAMES, "key"):
        raise UserError(f"filter: no field {field!r}; choose from {', '.join((*NAMES, 'key'))}")
    return field
