"""Files: their digests, writing them whole or not at all, and logs that a resumed run goes on with."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write what shall be at `path`: it gets there, whole, when the block ends without an error."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may write the same
    yield partial
    os.replace(partial, path)


def cut_after(path: Path, step: int) -> None:
    """Drops what a killed run logged past the checkpoint at `step` from a log of one JSON object a line, each with its `step`:
    it is about to be logged again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
        with aside(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line that the kill cut short
