"""How many samples a shard should hold, and what is found when it holds less.

A tar that was cut between two samples reads as a complete one. The count beside it tells: `NNNNN.index.json` of `ldm shards
index`, or img2dataset's `NNNNN_stats.json` or `NNNNN.parquet`.
"""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from ldm.data.shards import BadSample, Entry

Item = Entry | BadSample


def expected(sidecar: Callable[[str], bytes | None]) -> int | None:
    """The count of samples that a shard's side files promise; None where there is none that can be read.

    Args:
        sidecar: ending -> content of the file beside the shard, or None.
    """
    for ending, count in _COUNTS.items():
        data = sidecar(ending)
        if data is not None:
            try:
                return int(count(data))
            except (ValueError, KeyError, TypeError, RecursionError):  # pyarrow's errors are ValueErrors
                continue
    return None


def complete(found: Sequence[Item], promised: int | None) -> list[Item]:
    """What a shard holds as found in its tar -> one item for each of its samples, so that nothing goes uncounted.

    - Members of a sample that do not stand together come as several entries of one key: they become one BadSample.
    - Damage hides the samples after it: its reason is counted once for each sample that is missing.
    - A shard that holds less than was promised without visible damage was cut between two samples.
    """
    first: dict[str, int] = {}
    items: list[Item] = []
    for item in found:
        if isinstance(item, Entry) and item.key in first:
            items[first[item.key]] = BadSample("sample/split members")
            continue
        if isinstance(item, Entry):
            first[item.key] = len(items)
        items.append(item)
    if promised is None:
        return items
    damage = next((i for i in items if isinstance(i, BadSample) and i.reason.startswith("shard/")), None)
    if len(items) < promised:
        items += [damage or BadSample("shard/fewer samples than its manifest")] * (promised - len(items))
    elif len(items) > promised and damage is None:
        items.append(BadSample("shard/more samples than its manifest"))
    return items


def _parquet_count(data: bytes) -> int:
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data), columns=["status"])
    return table.column("status").to_pylist().count("success")


def _json_count(field: str) -> Callable[[bytes], Any]:
    return lambda data: json.loads(data)[field]


# ending of the side file -> how to read its count, the strictest first
_COUNTS: dict[str, Callable[[bytes], Any]] = {
    ".index.json": _json_count("count"),
    "_stats.json": _json_count("successes"),
    ".parquet": _parquet_count,
}
