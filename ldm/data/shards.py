"""Shards: tar files that hold each sample as adjacent members `key.jpg`, `key.txt`, `key.json`, as img2dataset writes them.

The names follow webdataset (the key ends at the first dot of the base name); the headers are read by the standard
library's tarfile and checked further here, because both end a damaged archive as if it were complete. Members are bytes
and stay bytes: nothing is unpickled, and no name from a shard reaches the file system.
"""

import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import BinaryIO, NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand

from ldm.errors import UserError

MAX_SHARDS = 1_000_000
MAX_BYTES = 2**27  # of one sample
_BLOCK = 512  # tar's unit
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


class BadSample(Exception):
    """A sample that cannot be used. `reason` is a short fixed text ("image/truncated"): drops are counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Entry(NamedTuple):
    """Where a sample lies in its shard."""

    key: str
    members: dict[str, tuple[int, int]]  # lower-case extension -> (offset, size) in bytes


def expand(spec: str | Sequence[str], how_to_make: str | None = None) -> list[str]:
    """`data/{00000..00012}.tar`, or several of them -> local paths, in the order written.

    Args:
        spec: paths with brace ranges or lists.
        how_to_make: the command that makes these shards, told when one is missing.

    Raises:
        UserError: no shard, more than a million, one twice, one missing, anything but a local path, broken braces.
    """
    paths: list[str] = []
    for text in [spec] if isinstance(spec, str) else spec:
        paths += _expand_one(text)
    if not paths:
        raise UserError(f"shards={spec!r} names no shard; expected a path such as data/{{00000..00012}}.tar")
    if len(paths) > MAX_SHARDS:
        raise UserError(f"shards={spec!r} names more than {MAX_SHARDS} shards; use fewer, larger ones")
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise UserError(f"shard {twice!r} is listed twice; list each shard once")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        hint = f"make them with: {how_to_make}" if how_to_make else "check the path"
        raise UserError(f"shard {missing[0]!r} is not a file ({len(missing)} of {len(paths)} are missing); {hint}")
    return paths


def _expand_one(text: str) -> list[str]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):  # pipe: would be a shell command to webdataset
        raise UserError(f"shard {text!r} is not a local path; download the shards and give their paths")
    # braceexpand builds every range in memory before it yields the first name
    ranges = [abs(int(b) - int(a)) // (int(step or 1) or 1) + 1 for a, b, step in _RANGE.findall(text)]
    if math.prod(ranges) > MAX_SHARDS:
        raise UserError(f"shards={text!r} names more than {MAX_SHARDS} shards; use fewer, larger ones")
    try:
        return list(islice(braceexpand(text), MAX_SHARDS + 1)) if text else []
    except UnbalancedBracesError:
        raise UserError(f"shards={text!r} has unbalanced braces; write a range as {{00000..00012}}") from None


def entries(file: BinaryIO) -> Iterator[Entry | BadSample]:
    """The samples of one open shard, in order; reads headers only.

    A sample that the tar itself spoils comes as a BadSample in its place. Damage ends the shard: the sample it touches (the last
    one begun) comes as "shard/...". A shard gives at least one item, so a reader always moves on.
    """
    key, members, twice = "", dict[str, tuple[int, int]](), False
    try:
        for header in _headers(file):
            name = _NAME.fullmatch(header.name)
            if not name or not header.isreg() or header.issparse():
                continue
            if name[1] != key:
                if members:
                    yield BadSample("sample/duplicate member") if twice else Entry(_printable(key), members)
                key, members, twice = name[1], {}, False
            extension = name[2].lower()
            twice |= extension in members
            members[extension] = (header.offset_data, header.size)
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


def _headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every header; BadSample where tarfile would raise, and where it would end quietly before the end-of-archive mark."""
    end = 0
    try:
        length = os.fstat(file.fileno()).st_size
        tar = tarfile.TarFile(fileobj=file)
        while (header := tar.next()) is not None:
            tar.members.clear()  # or it keeps them all
            if header.size < 0 or tar.offset <= end:  # a negative size would send tarfile in a circle (CVE-2025-8194)
                raise BadSample("shard/bad header")
            if tar.offset > length:  # its data with their padding
                raise BadSample("shard/truncated")
            end = tar.offset
            yield header
        file.seek(tar.offset)
        tail = file.read(128 * _BLOCK)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise BadSample("shard/unreadable") from error
    if len(tail) < _BLOCK:
        raise BadSample("shard/truncated")
    if any(tail):
        raise BadSample("shard/bad header" if any(tail[:_BLOCK]) else "shard/data after the end")


def _printable(name: str) -> str:
    """tarfile keeps bytes that are no UTF-8 as lone surrogates, which no log or file accepts."""
    return name.encode("utf-8", "replace").decode()
