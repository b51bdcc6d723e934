"""Each filter keeps what it says, and says what a missing value means."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.data.filters import Between, CaptionLength, CaptionWithout, NoneOf, NotListed, OneOf, SmallestSide
from ldm.errors import UserError


@pytest.mark.parametrize(
    ("make", "kept", "dropped"),
    [
        (lambda k: Between("aesthetic", k, low=5), [{"aesthetic": 5.0}], [{"aesthetic": 4.9}]),
        (lambda k: Between("punsafe", k, high=0.1), [{"punsafe": 0.1}], [{"punsafe": 0.11}]),
        (lambda k: SmallestSide(512, k), [{"width": 512.0, "height": 900.0}], [{"width": 900.0, "height": 511.0}]),
        (lambda k: OneOf("language", ["en"], k), [{"language": "en"}], [{"language": "fr"}]),
        (lambda k: NoneOf("license", ["?"], k), [{"license": "CC0"}], [{"license": "?"}]),
    ],
)
def test_bounds_and_missing_values(make: Callable, kept: list[dict], dropped: list[dict]) -> None:
    for keep_missing in (True, False):
        keep = make(keep_missing)
        assert all(keep(record) for record in kept)
        assert not any(keep(record) for record in dropped)
        assert keep({}) is keep_missing
    assert SmallestSide(512, False)({"width": 600.0}) is False


def test_captions() -> None:
    assert [CaptionLength(2, 4)({"caption": "a" * n}) for n in range(1, 6)] == [False, True, True, True, False]
    keep = CaptionWithout(["Stock photo", "ß"])
    assert keep({"caption": "a photo in stock"})
    assert not keep({"caption": "STOCK PHOTO of a cat"})
    assert not keep({"caption": "STRASSE"})


def test_a_list_of_what_to_drop(tmp_path: Path) -> None:
    path = tmp_path / "duplicates.txt"
    path.write_bytes(b"\xef\xbb\xbf000000001\r\n\r\n000000005\n")
    keep = NotListed("key", str(path), keep_missing=True)
    assert [keep({"key": f"{n:09d}"}) for n in (0, 1, 5)] == [True, False, False]
    with pytest.raises(UserError, match=r"filter on key: '.*nowhere' cannot be read"):
        NotListed("key", str(tmp_path / "nowhere"), True)


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"filter: no field 'aesthetics'; choose from caption, "):
        Between("aesthetics", True, low=5)
    with pytest.raises(UserError, match=r"low=None, high=None; give one bound"):
        Between("aesthetic", True)
    with pytest.raises(UserError, match=r"low=5, high=4"):
        Between("aesthetic", True, 5, 4)
    with pytest.raises(UserError, match=r"low=5, high=4"):
        CaptionLength(5, 4)
