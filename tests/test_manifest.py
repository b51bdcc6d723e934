"""What a shard should hold, from its side files; and what it holds, one item a sample."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.data.manifest import complete, expected
from ldm.data.shards import BadSample, Entry


def parquet(statuses: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"status": statuses}), file)
    return file.getvalue()


STATS = json.dumps({"count": 10, "successes": 7, "failed_to_resize": 3}).encode()


def test_the_strictest_side_file_counts() -> None:
    files = {".index.json": b'{"count": 5}', "_stats.json": STATS, ".parquet": parquet(["success"] * 3 + ["failed"])}
    assert expected(files.get) == 5
    del files[".index.json"]
    assert expected(files.get) == 7
    del files["_stats.json"]
    assert expected(files.get) == 3
    assert expected({}.get) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"successes": "many"}', b'{"successes": null}', b"PAR1"])
def test_a_side_file_that_cannot_be_read_is_passed_over(data: bytes) -> None:
    assert expected({"_stats.json": data}.get) is None
    assert expected({"_stats.json": data, ".parquet": parquet(["success"])}.get) == 1
    assert expected({".parquet": data}.get) is None


def entry(key: str) -> Entry:
    return Entry(key, {"jpg": (0, 1)})


def reasons(items: list[Entry | BadSample]) -> list[str]:
    return [item.reason if isinstance(item, BadSample) else item.key for item in items]


def test_one_item_for_each_sample() -> None:
    cut = BadSample("shard/truncated")
    assert reasons(complete([entry("a"), entry("b")], 2)) == ["a", "b"]
    assert reasons(complete([entry("a"), entry("b")], None)) == ["a", "b"]
    assert reasons(complete([entry("a"), entry("b")], 4)) == ["a", "b"] + ["shard/fewer samples than its manifest"] * 2
    assert reasons(complete([entry("a"), cut], 4)) == ["a"] + ["shard/truncated"] * 3
    assert reasons(complete([entry("a"), cut], None)) == ["a", "shard/truncated"]
    assert reasons(complete([entry("a"), entry("b")], 1)) == ["a", "b", "shard/more samples than its manifest"]
    assert reasons(complete([entry("a"), BadSample("shard/data after the end")], 1)) == [
        "a",
        "shard/data after the end",
    ]


def test_members_that_do_not_stand_together() -> None:
    assert reasons(complete([entry("a"), entry("b"), entry("a"), entry("b"), entry("c")], 3)) == [
        "sample/split members",
        "sample/split members",
        "c",
    ]
