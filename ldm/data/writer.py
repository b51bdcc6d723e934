"""Writes LAION-style shards, as img2dataset does: NNNNN.tar of .jpg/.png, .txt, .json, with NNNNN.parquet, NNNNN_stats.json."""

import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image, UnidentifiedImageError

from ldm.errors import UserError

_ORIENTATION = 0x0112  # EXIF


class ShardWriter:
    """Writes samples in order, `shard_size` to a shard. The same samples give the same bytes.

    Every file is written aside and renamed, the tar last: a shard that exists is complete, with its side files.

    Args:
        folder: made when it is not there.
        shard_size: items of a shard, dropped ones too: 1..9999, because a key is the 5-digit shard and a 4-digit index.
        first: number of the first shard.
    """

    def __init__(self, folder: str | Path, shard_size: int = 1000, first: int = 0) -> None:
        if not 1 <= shard_size <= 9999:
            raise UserError(f"shard_size is {shard_size}; a key has four digits for the sample: give 1..9999")
        self.folder, self.shard_size = Path(folder), shard_size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard, self.rows = first, list[dict[str, Any]]()
        self.tar: Any = None  # webdataset.TarWriter, once the shard has a sample

    def write(self, image: bytes, extension: str, caption: str, metadata: Mapping[str, Any] | None = None) -> str:
        """image: encoded; extension: "jpg" or "png"; metadata: plain data, into the json, where it may say the original size
        but not take the place of what is known here. Returns the sample's key.

        Raises:
            UserError: another extension, or bytes that are no picture.
        """
        if extension not in ("jpg", "png"):
            raise UserError(f"extension is {extension!r}; shards hold pictures as 'jpg' or 'png'")
        try:
            width, height = _size(image)
        except UnidentifiedImageError:
            raise UserError(f"{len(image)} bytes that are no picture; give an encoded {extension}") from None
        if self.tar is None:
            # an open file: given a name, webdataset would also take a command
            self.file = self._path(".tar.partial").open("wb")
            self.tar = webdataset.TarWriter(self.file, encoder=False, mtime=0)
        own = self._row(caption, "success", None) | {"width": width, "height": height}
        row = own | {"original_width": width, "original_height": height, **(metadata or {})} | own
        text = {"txt": caption.encode(), "json": json.dumps(row).encode()}
        self.tar.write({"__key__": row["key"], extension: image, **text})
        self._add(row)
        return row["key"]

    def drop(self, reason: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Counts an item that cannot be used: it takes a key and a row of the parquet, as in img2dataset, but nothing in the
        tar. A shard that holds only such items gets no tar."""
        own = self._row(None, "failed", reason)
        self._add(own | {**(metadata or {})} | own)

    def _row(self, caption: str | None, status: str, error: str | None) -> dict[str, Any]:
        key = f"{self.shard:05d}{len(self.rows):04d}"
        return {"caption": caption, "key": key, "status": status, "error_message": error}

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == self.shard_size:
            self._finish()

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.shard:05d}{ending}"

    def _close(self) -> None:
        self.tar.close()
        self.file.close()

    def _finish(self) -> None:
        if not self.rows:
            return
        endings = [".parquet", "_stats.json"]
        if self.tar is not None:
            self._close()
            endings.append(".tar")
        names = dict.fromkeys(name for row in self.rows for name in row)  # all columns that any row has
        table = pa.table({name: _column([row.get(name) for row in self.rows]) for name in names})
        pq.write_table(table, self._path(".parquet.partial"))
        reasons = Counter(row["error_message"] or "success" for row in self.rows)
        stats = {"count": len(self.rows), "successes": reasons["success"], "failed_to_resize": 0}
        self._path("_stats.json.partial").write_text(json.dumps(stats | {"status_dict": dict(reasons)}))
        for ending in endings:
            self._path(f"{ending}.partial").rename(self._path(ending))
        self.shard, self.rows, self.tar = self.shard + 1, [], None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self.tar is not None:
            self._close()
            self._path(".tar.partial").unlink()  # a shard is complete or not there


def _size(image: bytes) -> tuple[int, int]:
    """Width and height as a viewer shows the picture: EXIF may turn it."""
    opened = Image.open(io.BytesIO(image))
    width, height = opened.size
    return (height, width) if opened.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def _column(values: list[Any]) -> pa.Array:
    """Nested and mixed values become JSON text: Parquet has no {}, and no column of numbers and strings."""
    try:
        column = pa.array(values)
    except (ValueError, TypeError, OverflowError):  # Arrow's own errors are kinds of these
        column = None
    if column is None or pa.types.is_nested(column.type):
        return pa.array([None if value is None else json.dumps(value) for value in values])
    return column
