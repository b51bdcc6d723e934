"""Pictures with captions as people have them, for `ldm shards make`: a folder, or a table that names or holds the pictures.

A source is cut into parts before anything is read: a part is small, travels to a worker, and reads its items there.
"""

import csv
import hashlib
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.data.schema import NAMES, normalize, parse
from ldm.data.shards import MAX_BYTES, BadSample
from ldm.data.transforms import EXTENSIONS
from ldm.errors import UserError
from ldm.files import sha256

# what cannot be read is an item too: a picture is dropped aloud, not passed over
_PICTURES = (*EXTENSIONS, "gif", "bmp", "tif", "tiff", "avif", "heic", "jfif")
_IMAGE_NAMES = ("image", "image_path", "img", "file_name", "filename", "file_path", "filepath", "file", "path")


class Raw(NamedTuple):
    """A picture as its source has it."""

    image: bytes
    caption: bytes | None
    metadata: dict[str, Any]


Row = dict[str, Any] | BadSample
Contents = tuple[list[str], Sequence[Any]]  # of a table: names of columns, and an entry for each row
Item = tuple[str, Callable[[], Raw]]  # what people call it; how to read it: raises BadSample


@dataclass(frozen=True)
class Source:
    """Items in a fixed order. digest: changes when the items do; name: for people."""

    name: str
    digest: str
    entries: Sequence[Any]  # one for each item

    def __len__(self) -> int:
        return len(self.entries)

    def part(self, start: int, stop: int) -> Self:
        return replace(self, entries=self.entries[start:stop])

    def items(self) -> Iterator[Item]:
        raise NotImplementedError


def open_source(path: str | Path, image_column: str | None = None, caption_column: str | None = None) -> Source:
    """A folder of pictures, or a .csv, .tsv, .jsonl or .parquet table with a row for each picture.

    Args:
        image_column: of a table: paths relative to the table's folder, or in Parquet the encoded pictures themselves (also
            as Hugging Face's {bytes, path}). None: found by its usual names, as caption_column is.

    Raises:
        UserError: nothing there, nothing in it, another kind of file, a broken table, a column that is not there.
    """
    path = Path(path)
    if path.is_dir():
        if image_column or caption_column:
            raise UserError(f"{path} is a folder; --image-column and --caption-column are for tables")
        source: Source = _folder(path)
    elif path.is_file():
        if path.suffix.lower() not in _TABLES:
            raise UserError(f"{path} is not a folder or a table; expected one of {', '.join(_TABLES)}")
        kind, read = _TABLES[path.suffix.lower()]
        names, rows = read(path)
        image = _column(path, names, image_column, _IMAGE_NAMES, "--image-column")
        caption = _column(path, names, caption_column, NAMES["caption"], "--caption-column")
        source = kind(str(path), sha256(path), rows, image, caption)
    else:
        raise UserError(f"there is no {path}; give a folder of pictures or a table ({', '.join(_TABLES)})")
    if not len(source):
        raise UserError(f"{path} holds no pictures; expected files such as .jpg beside a .txt, or a table with rows")
    return source


class _Folder(Source):
    """Pictures by their relative paths, each with its caption in the .txt or the .json beside it."""

    def items(self) -> Iterator[Item]:
        for path in self.entries:
            yield path, partial(self._read, path)

    def _read(self, path: str) -> Raw:
        image = _file(Path(self.name, path), "image")
        stem = Path(self.name, path).with_suffix("")
        metadata = parse(_beside(stem, ".json"))
        caption = _beside(stem, ".txt")
        if caption is not None:
            return Raw(image, caption.removeprefix(BOM_UTF8), metadata)
        return Raw(image, _encoded(normalize(metadata).get("caption")), metadata)


def _folder(path: Path) -> _Folder:
    """The digest is of names, sizes and times: reading every picture only to know it again would take too long."""
    digest, paths = hashlib.sha256(), []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        there = set(names)
        for name in names:
            stem, _, extension = name.rpartition(".")
            if stem and not name.startswith(".") and extension.lower() in _PICTURES:  # macOS leaves ._a.jpg
                beside = [each for each in (name, f"{stem}.txt", f"{stem}.json") if each in there]
                stats = [(each, stat.st_size, stat.st_mtime_ns) for each in beside if (stat := _stat(folder, each))]
                paths.append((os.path.relpath(os.path.join(folder, name), path), stats))
    for each in sorted(paths):
        digest.update(json.dumps(each).encode())
    return _Folder(str(path), digest.hexdigest(), [name for name, _ in sorted(paths)])


@dataclass(frozen=True)
class _Table(Source):
    """Rows in memory, each naming its picture."""

    image: str
    caption: str

    def items(self) -> Iterator[Item]:
        for number, row in self._rows():
            yield _called(row, self.image, number), partial(self._raw, row)

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """With their numbers, from 1."""
        yield from self.entries

    def _raw(self, row: Row) -> Raw:
        if isinstance(row, BadSample):
            raise row
        value, caption = row.get(self.image), row.get(self.caption)
        if caption is not None and not isinstance(caption, str):
            raise BadSample("caption/not text")
        metadata = {name: each for name, each in row.items() if name not in (self.image, self.caption)}
        return Raw(_image(value, Path(self.name).parent), _encoded(caption), metadata)


class _Parquet(_Table):
    """Rows read where they are needed, a row group at a time: they may hold the pictures. entries: a range of places."""

    def _rows(self) -> Iterator[tuple[int, Row]]:
        with _parquet(self.name) as file:
            columns = [field.name for field in file.schema_arrow if field.name == self.image or not _holds_bytes(field)]
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            starts = [0, *accumulate(sizes)]
            mine = [i for i, (a, b) in enumerate(pairwise(starts)) if a <= self.entries[-1] and b > self.entries[0]]
            batches = file.iter_batches(64, mine, columns)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((place + 1, row) for place, row in enumerate(rows, starts[mine[0]]) if place in self.entries)


@contextmanager
def _parquet(path: str | Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as a Parquet table: {' '.join(str(error).split())}") from None


def _read_parquet(path: Path) -> Contents:
    with _parquet(path) as file:
        return file.schema_arrow.names, range(file.metadata.num_rows)


def _holds_bytes(field: pa.Field) -> bool:
    """Other pictures, embeddings: nothing that a .json could hold."""
    kind = field.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i)) for i in range(kind.num_fields))


def _read_delimited(dialect: str, path: Path) -> Contents:
    csv.field_size_limit(2**24)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, dialect=dialect, strict=True)  # else a lone quote swallows lines in silence
        try:
            return list(reader.fieldnames or []), list(enumerate(map(_checked, reader), 1))
        except csv.Error as error:
            raise UserError(f"{path} after line {reader.line_num}: {error}; mend the quotes there") from None


def _checked(row: dict[Any, Any]) -> Row:
    """A row too short has None for a value, one too long has None for a name: who knows which value is whose?"""
    return BadSample("table/wrong columns") if None in row or None in row.values() else row


def _read_json_lines(path: Path) -> Contents:
    rows = [_parsed(line) for line in path.read_bytes().removeprefix(BOM_UTF8).splitlines() if line.strip()]
    names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    return list(names), list(enumerate(rows, 1))


def _parsed(line: bytes) -> Row:
    try:
        return parse(line)
    except BadSample as bad:
        return bad


_TABLES: dict[str, tuple[type[_Table], Callable[[Path], Contents]]] = {
    ".csv": (_Table, partial(_read_delimited, "excel")),
    ".tsv": (_Table, partial(_read_delimited, "excel-tab")),
    ".jsonl": (_Table, _read_json_lines),
    ".parquet": (_Parquet, _read_parquet),
}


def _column(path: Path, names: list[str], chosen: str | None, usual: Sequence[str], option: str) -> str:
    if chosen in names:
        return chosen
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None or chosen is not None:
        wanted = f"no column {chosen!r}" if chosen else f"none of the columns {', '.join(usual)}"
        raise UserError(f"{path} has {wanted}; choose with {option} from: {', '.join(names)}")
    return found


def _called(row: Row, column: str, number: int) -> str:
    value = None if isinstance(row, BadSample) else row.get(column)
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) and path else f"row {number}"


def _image(value: Any, folder: Path) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadSample("image/missing")
    if re.match(r"\w+://", value):
        raise BadSample("image/a URL, not a file")
    return _file(folder / value, "image")


def _encoded(text: str | None) -> bytes | None:
    """What was no Unicode in the table is none here, and the reader's rules drop it."""
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _file(path: Path, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise BadSample(f"{kind}/missing") from None
    except (OSError, ValueError):  # a name with NUL
        raise BadSample(f"{kind}/cannot be opened") from None
    if len(data) > MAX_BYTES:
        raise BadSample("sample/too large")
    return data


def _beside(stem: Path, ending: str) -> bytes | None:
    path = stem.with_name(stem.name + ending)
    return _file(path, ending[1:]) if path.is_file() else None


def _stat(folder: str, name: str) -> os.stat_result | None:
    try:
        return os.stat(os.path.join(folder, name))
    except OSError:  # a link to nothing: counted when it is read
        return None
