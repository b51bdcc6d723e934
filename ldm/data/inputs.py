"""Pictures with captions as people have them, for `ldm shards make`: a folder, or a table that names or holds the pictures.

A source is cut into parts before anything is read: a part is small, travels to a worker, and reads its items there.
"""

import csv
import hashlib
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.data.schema import NAMES, normalize, parse
from ldm.data.shards import MAX_BYTES, BadSample
from ldm.data.transforms import EXTENSIONS
from ldm.errors import UserError

# what cannot be read is an item too: a picture is dropped aloud, not passed over
_PICTURES = (*EXTENSIONS, "gif", "bmp", "tif", "tiff", "avif", "heic", "jfif")
_IMAGE_NAMES = ("image", "image_path", "img", "file_name", "filename", "file_path", "filepath", "file", "path")


class Raw(NamedTuple):
    """A picture as its source has it."""

    image: bytes
    caption: bytes | None
    metadata: dict[str, Any]


Item = tuple[str, Callable[[], Raw]]  # what people call it; how to read it: raises BadSample


class Source(Protocol):
    """Items in a fixed order. digest: changes when the items do; name: for people."""

    name: str
    digest: str

    def __len__(self) -> int: ...
    def part(self, start: int, stop: int) -> "Source": ...
    def items(self) -> Iterator[Item]: ...


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
        source = _TABLES[path.suffix.lower()](path, image_column, caption_column)
    else:
        raise UserError(f"there is no {path}; give a folder of pictures or a table ({', '.join(_TABLES)})")
    if not len(source):
        raise UserError(f"{path} holds no pictures; expected files such as .jpg beside a .txt, or a table with rows")
    return source


@dataclass(frozen=True)
class _Folder:
    """Pictures, each with its caption in the .txt or the .json beside it."""

    name: str
    digest: str
    paths: Sequence[str]  # relative

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, start: int, stop: int) -> "_Folder":
        return replace(self, paths=self.paths[start:stop])

    def items(self) -> Iterator[Item]:
        for path in self.paths:
            yield path, lambda path=path: self._read(path)

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
class _Table:
    """Rows in memory, each naming its picture."""

    name: str
    digest: str
    rows: Sequence[dict[str, Any] | BadSample]
    image: str
    caption: str
    first: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> "_Table":
        return replace(self, rows=self.rows[start:stop], first=self.first + start)

    def items(self) -> Iterator[Item]:
        for number, row in enumerate(self.rows, self.first):
            yield _called(row, self.image, number), lambda row=row: _from_row(row, self)


@dataclass(frozen=True)
class _Parquet:
    """Rows read where they are needed, a row group at a time: they may hold the pictures."""

    name: str
    digest: str
    image: str
    caption: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "_Parquet":
        return replace(self, start=self.start + start, stop=min(self.start + stop, self.stop))

    def items(self) -> Iterator[Item]:
        for number, row in self._rows():
            yield _called(row, self.image, number + 1), lambda row=row: _from_row(row, self)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            yield from self._read()
        except (pa.ArrowException, OSError) as error:
            raise _no_parquet(self.name, error) from None

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with pq.ParquetFile(self.name) as file:
            columns = [field.name for field in file.schema_arrow if field.name == self.image or not _holds_bytes(field)]
            first = 0
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                if first < self.stop and end > self.start:
                    for batch in file.iter_batches(64, [group], columns):
                        for number, row in enumerate(batch.to_pylist(), first):
                            if self.start <= number < self.stop:
                                yield number, row
                        first += len(batch)
                first = end


def _parquet(path: Path, image: str | None, caption: str | None) -> _Parquet:
    try:
        with pq.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from None
    return _Parquet(str(path), _digest(path), *_columns(path, names, image, caption), 0, rows)


def _no_parquet(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as a Parquet table: {' '.join(str(error).split())}")


def _holds_bytes(field: pa.Field) -> bool:
    """Other pictures, embeddings: nothing that a .json could hold."""
    kind = field.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i)) for i in range(kind.num_fields))


def _delimited(dialect: str) -> Callable[[Path, str | None, str | None], _Table]:
    def open_table(path: Path, image: str | None, caption: str | None) -> _Table:
        csv.field_size_limit(2**24)
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, dialect=dialect, strict=True)  # else a lone quote swallows lines in silence
            try:
                names = list(reader.fieldnames or [])
                rows = [_checked(row) for row in reader]
            except csv.Error as error:
                raise UserError(f"{path} after line {reader.line_num}: {error}; mend the quotes there") from None
        return _Table(str(path), _digest(path), rows, *_columns(path, names, image, caption))

    return open_table


def _checked(row: dict[Any, Any]) -> dict[str, Any] | BadSample:
    """A row too short has None for a value, one too long has None for a name: who knows which value is whose?"""
    return BadSample("table/wrong columns") if None in row or None in row.values() else row


def _json_lines(path: Path, image: str | None, caption: str | None) -> _Table:
    rows: list[dict[str, Any] | BadSample] = []
    for line in path.read_bytes().removeprefix(BOM_UTF8).splitlines():
        if line.strip():
            try:
                rows.append(parse(line))
            except BadSample as bad:
                rows.append(bad)
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    return _Table(str(path), _digest(path), rows, *_columns(path, names, image, caption))


_TABLES: dict[str, Callable[[Path, str | None, str | None], Source]] = {
    ".csv": _delimited("excel"),
    ".tsv": _delimited("excel-tab"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def _columns(path: Path, names: list[str], image: str | None, caption: str | None) -> tuple[str, str]:
    return (
        _column(path, names, image, _IMAGE_NAMES, "--image-column"),
        _column(path, names, caption, NAMES["caption"], "--caption-column"),
    )


def _column(path: Path, names: list[str], chosen: str | None, usual: Sequence[str], option: str) -> str:
    if chosen in names:
        return chosen
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None or chosen is not None:
        wanted = f"no column {chosen!r}" if chosen else f"none of the columns {', '.join(usual)}"
        raise UserError(f"{path} has {wanted}; choose with {option} from: {', '.join(names)}")
    return found


def _called(row: Mapping[str, Any] | BadSample, column: str, number: int) -> str:
    value = None if isinstance(row, BadSample) else row.get(column)
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) and path else f"row {number}"


def _from_row(row: Mapping[str, Any] | BadSample, table: _Table | _Parquet) -> Raw:
    if isinstance(row, BadSample):
        raise row
    value, caption = row.get(table.image), row.get(table.caption)
    if caption is not None and not isinstance(caption, str):
        raise BadSample("caption/not text")
    metadata = {name: each for name, each in row.items() if name not in (table.image, table.caption)}
    return Raw(_image(value, Path(table.name).parent), _encoded(caption), metadata)


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
