"""Writes LAION-style shards, as img2dataset does: NNNNN.tar of .jpg/.png, .txt, .json, with NNNNN.parquet, NNNNN_stats.json."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image, UnidentifiedImageError

from ldm.errors import UserError


class ShardWriter:
    """Writes samples in order, `shard_size` to a shard. The same samples give the same bytes.

    Every file is written aside and renamed, the tar last: a shard that exists is complete, with its side files.

    Args:
        folder: made when it is not there.
        shard_size: 1..9999, because a key is the 5-digit shard and a 4-digit index.
    """

    def __init__(self, folder: str | Path, shard_size: int = 1000) -> None:
        if not 1 <= shard_size <= 9999:
            raise UserError(f"shard_size is {shard_size}; a key has four digits for the sample: give 1..9999")
        self.folder, self.shard_size = Path(folder), shard_size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard, self.rows = 0, []
        self.tar: webdataset.TarWriter | None = None

    def write(self, image: bytes, extension: str, caption: str, metadata: Mapping[str, Any] | None = None) -> str:
        """image: encoded; extension: "jpg" or "png"; metadata: plain data, into the json. Returns the sample's key.

        Raises:
            UserError: another extension, or bytes that are no picture.
        """
        if extension not in ("jpg", "png"):
            raise UserError(f"extension is {extension!r}; shards hold pictures as 'jpg' or 'png'")
        try:
            width, height = Image.open(io.BytesIO(image)).size
        except UnidentifiedImageError:
            raise UserError(f"{len(image)} bytes that are no picture; give an encoded {extension}") from None
        if self.tar is None:
            # an open file: given a name, webdataset would also take a command
            self.file = self._path(".tar.partial").open("wb")
            self.tar = webdataset.TarWriter(self.file, encoder=False, mtime=0)
        key = f"{self.shard:05d}{len(self.rows):04d}"
        row = {
            "caption": caption,
            "key": key,
            "status": "success",
            "error_message": None,
            "width": width,
            "height": height,
        }
        row |= {"original_width": width, "original_height": height, **(metadata or {})}
        text = {"txt": caption.encode(), "json": json.dumps(row).encode()}
        self.tar.write({"__key__": key, extension: image, **text})
        self.rows.append(row)
        if len(self.rows) == self.shard_size:
            self._finish()
        return key

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.shard:05d}{ending}"

    def _close(self) -> None:
        self.tar.close()
        self.file.close()

    def _finish(self) -> None:
        if self.tar is None:
            return
        self._close()
        pq.write_table(pa.Table.from_pylist(self.rows), self._path(".parquet.partial"))
        stats = {"count": len(self.rows), "successes": len(self.rows), "failed_to_resize": 0}
        self._path("_stats.json.partial").write_text(json.dumps(stats))
        for ending in (".parquet", "_stats.json", ".tar"):
            self._path(f"{ending}.partial").rename(self._path(ending))
        self.shard, self.rows, self.tar = self.shard + 1, [], None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self.tar is not None:
            self._close()
            self._path(".tar.partial").unlink()  # a shard is complete or not there
