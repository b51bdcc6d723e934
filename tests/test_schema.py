"""The subsets' names become one set; what is not a value is missing."""

import pytest

from ldm.data.schema import normalize, parse
from ldm.data.shards import BadSample

ROWS = {
    "laion400m": (
        {
            "SAMPLE_ID": 1,
            "URL": "http://a",
            "TEXT": "a cat",
            "LICENSE": "?",
            "NSFW": "UNLIKELY",
            "similarity": 0.31,
            "WIDTH": 640,
            "HEIGHT": 480,
        },
        {
            "url": "http://a",
            "caption": "a cat",
            "license": "?",
            "nsfw": "UNLIKELY",
            "similarity": 0.31,
            "width": 640.0,
            "height": 480.0,
        },
    ),
    "laion2b": (
        {
            "url": "http://a",
            "caption": "a cat",
            "punsafe": 0.01,
            "pwatermark": "0.2",
            "similarity": 0.3,
            "hash": -123,
            "LANGUAGE": "en",
        },
        {
            "url": "http://a",
            "caption": "a cat",
            "punsafe": 0.01,
            "pwatermark": 0.2,
            "similarity": 0.3,
            "hash": "-123",
            "language": "en",
        },
    ),
    "aesthetic": (
        {"URL": "http://a", "TEXT": "a cat", "AESTHETIC_SCORE": 6.25},
        {"url": "http://a", "caption": "a cat", "aesthetic": 6.25},
    ),
    "img2dataset": (
        {
            "caption": "a cat",
            "key": "000000012",
            "status": "success",
            "width": 256,
            "height": 256,
            "original_width": 1024,
            "original_height": 768,
            "sha256": "ab",
        },
        {"caption": "a cat", "width": 1024.0, "height": 768.0, "hash": "ab"},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_subset(name: str) -> None:
    row, record = ROWS[name]
    assert normalize(row) == record


@pytest.mark.parametrize("value", [None, "", "n/a", float("nan"), float("inf"), "NaN", True, [1], {"a": 1}, "1e999"])
def test_what_is_not_a_number_is_missing(value: object) -> None:
    assert "aesthetic" not in normalize({"aesthetic": value})


@pytest.mark.parametrize("value", [None, "", "  ", True, 1.5, ["en"]])
def test_what_is_not_a_text_is_missing(value: object) -> None:
    assert "language" not in normalize({"language": value})


def test_the_next_name_serves_where_the_best_is_missing() -> None:
    assert normalize({"original_width": None, "width": 5}) == {"width": 5.0}


def test_parse() -> None:
    assert parse(None) == {}
    assert parse(b'{"a": NaN}').keys() == {"a"}
    for data, reason in [
        (b"{", "unreadable"),
        (b"3", "not an object"),
        (b"[" * 99_999, "unreadable"),
        (b" " * 2**21, "too long"),
    ]:
        with pytest.raises(BadSample, match=f"json/{reason}"):
            parse(data)
