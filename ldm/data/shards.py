"""Shards: tar files that hold each sample as adjacent members `key.jpg`, `key.txt`, `key.json`, as img2dataset writes them.

The names follow webdataset (the key ends at the first dot of the base name); the headers are read by the standard
library's tarfile and checked further here, because both end a damaged archive as if it were complete. Members are bytes
and stay bytes: nothing is unpickled, and no name from a shard reaches the file system.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_BYTES = 2**27  # of one sample
_BLOCK = 512  # tar's unit
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


class BadSample(Exception):
    """A sample that cannot be used. `reason` is a short fixed text ("image/truncated"): drops are counted by it."""

    where = ""  # shard and key, noted by the reader

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Entry(NamedTuple):
    """Where a sample lies in its shard."""

    key: str
    members: dict[str, tuple[int, int]]  # lower-case extension -> (offset, size) in bytes


def entries(file: BinaryIO) -> Iterator[Entry | BadSample]:
    """The samples of one open shard, in order; reads headers only.

    A sample that the tar itself spoils comes as a BadSample in its place. Damage ends the shard: the sample it touches (the last
    one begun) comes as "shard/...". A shard gives at least one item, so a reader always moves on.
    """
    key, members, twice = "", dict[str, tuple[int, int]](), False
    try:
        for path, offset, size in _files(file):
            name = _NAME.fullmatch(path)
            if not name:
                continue
            if name[1] != key:
                if members:
                    yield BadSample("sample/duplicate member") if twice else Entry(_printable(key), members)
                key, members, twice = name[1], {}, False
            extension = name[2].lower()
            twice |= extension in members
            members[extension] = (offset, size)
        if not members:
            raise BadSample("shard/empty")
    except BadSample as damage:
        yield damage
    else:
        yield BadSample("sample/duplicate member") if twice else Entry(_printable(key), members)


def read(file: BinaryIO, entry: Entry) -> dict[str, bytes]:
    """{extension: bytes} of one sample.

    Raises:
        BadSample: over MAX_BYTES, or the file cannot give what its headers promised.
    """
    if sum(size for _, size in entry.members.values()) > MAX_BYTES:
        raise BadSample("sample/too large")
    members = {}
    for extension, (offset, size) in entry.members.items():
        try:
            members[extension] = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadSample("shard/unreadable") from error
        if len(members[extension]) < size:
            raise BadSample("shard/truncated")
    return members


def _files(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file; BadSample where tarfile would raise, and where it would end quietly before
    the end-of-archive mark."""
    end = 0
    try:
        length = os.fstat(file.fileno()).st_size
        tar = tarfile.TarFile(fileobj=file)  # has read the first header
        while True:
            found = _plain_file(os.pread(file.fileno(), _BLOCK, end)) if end and not tar.pax_headers else None
            if found:
                name, size = found
                start, wanted = end + _BLOCK, True
                tar.offset = start - -size // _BLOCK * _BLOCK
            elif (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                name, start, size = header.name, header.offset_data, header.size
                wanted = header.isreg() and not header.issparse()
            else:
                break
            if size < 0 or tar.offset <= end:  # a negative size would send tarfile in a circle (CVE-2025-8194)
                raise BadSample("shard/bad header")
            if tar.offset > length:  # its data with their padding
                raise BadSample("shard/truncated")
            end = tar.offset
            if wanted:
                yield name, start, size
        file.seek(tar.offset)
        tail = file.read(128 * _BLOCK)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise BadSample("shard/unreadable") from error
    if len(tail) < _BLOCK:
        raise BadSample("shard/truncated")
    if any(tail):
        raise BadSample("shard/bad header" if any(tail[:_BLOCK]) else "shard/data after the end")


def _plain_file(block: bytes) -> tuple[str, int] | None:
    """(name, size) of a regular file's header that holds nothing unusual; None: tarfile has to judge.

    Headers are most of what reading small samples costs; tarfile takes seven times as long for one.
    """
    name, size, sum_said = block[:100].rstrip(b"\0"), block[124:136].rstrip(b"\0"), block[148:156]
    if (
        block[156:157] != b"0"
        or block[345:346] != b"\0"
        or b"\0" in name
        or not (name.isascii() and name[-1:].isalnum())
    ):
        return None
    try:
        if sum(block) - sum(sum_said) + 8 * ord(" ") != int(sum_said.rstrip(b"\0 ").partition(b"\0")[0], 8):
            return None
        return name.decode(), int(size, 8)
    except ValueError:
        return None


def _printable(name: str) -> str:
    """tarfile keeps bytes that are no UTF-8 as lone surrogates, which no log or file accepts."""
    return name.encode("utf-8", "replace").decode()
