"""Shards from pictures and captions: `ldm shards make`.

Items in the source's order, `shard_size` to a shard; an item that training could not use is left out and makes its shard
smaller, so each shard depends on its own items alone. That is why any number of workers gives the same bytes, and why a run
that was stopped goes on with the shards that are not there yet.
"""

import fcntl
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageOps
from rich.console import Console
from rich.text import Text

from ldm.data.audit import table
from ldm.data.decode import DecodeSample
from ldm.data.inputs import Raw, Source
from ldm.data.parallel import in_parallel
from ldm.data.shards import BadSample
from ldm.data.transforms import FORMATS
from ldm.data.writer import ShardWriter
from ldm.errors import UserError

EXAMPLES = 3  # of each reason
_FORMAT = 1  # of what this program writes: shards of another are not continued
_ENDINGS = (".tar", ".parquet", "_stats.json")
_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # as they are (MPO: a JPEG with more behind it, from phones)


@dataclass
class Made:
    """What became of the items; written + dropped = items. examples: reason -> what the first such items are called."""

    items: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)  # their numbers, as in the names

    def add(self, other: "Made") -> None:
        self.items += other.items
        self.written += other.written
        self.dropped += other.dropped
        for reason, names in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + names)[:EXAMPLES]
        self.shards += other.shards


def make(source: Source, folder: str | Path, shard_size: int = 1000, workers: int | None = None) -> Made:
    """Writes folder/NNNNN.tar with side files; make.json says from what, make_report.json what became of the items.

    Args:
        shard_size: items of a shard, 1..9999.
        workers: processes; 1: this one; None: one a core. They change nothing but the speed.

    Raises:
        UserError: the folder holds shards of another source or of other options, or another process is writing there.
    """
    folder = Path(folder)
    ShardWriter(folder, shard_size)  # refuses a size
    starts = range(0, len(source), shard_size)
    tasks = [(number, source.part(start, start + shard_size)) for number, start in enumerate(starts)]
    made = Made()
    with _claimed(folder, {"format": _FORMAT, "digest": source.digest, "items": len(source), "shard_size": shard_size}):
        for part in in_parallel(partial(_make_shard, folder, shard_size), tasks, workers, f"{folder}"):
            made.add(part)
        report = {"source": source.name, **vars(made), "dropped": dict(made.dropped.most_common())}
        (folder / "make_report.json").write_text(json.dumps(report, indent=2))
    return made


@contextmanager
def _claimed(folder: Path, request: dict[str, Any]) -> Iterator[None]:
    """The folder is this process's, for these items. The kernel frees the lock of a process that dies."""
    with (folder / "make.json").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process writes to {folder}; wait for it, or give another folder") from None
        file.seek(0)
        before = file.read()
        if before and before != json.dumps(request):
            raise UserError(
                f"{folder} was made from another input: the pictures, captions or options have changed; give another "
                "folder, or delete this one"
            )
        if not before:
            if any(folder.glob("[0-9]" * 5 + "[._]*")):
                (folder / "make.json").unlink()
                raise UserError(f"{folder} holds shards that this command did not make; give another folder")
            file.write(json.dumps(request))
            file.flush()
        yield


def _make_shard(folder: Path, shard_size: int, task: tuple[int, Source]) -> Made:
    number, source = task
    paths = [folder / f"{number:05d}{ending}" for ending in _ENDINGS]
    if not all(path.exists() for path in paths):
        with ShardWriter(folder, shard_size, number) as writer:
            for name, load in source.items():
                try:
                    raw = load()
                    image, extension, caption, metadata = _sample(raw)
                except BadSample as bad:
                    writer.drop(bad.reason, {"source_path": name})
                else:
                    writer.write(image, extension, caption, {"source_path": name} | metadata)
    return _made(*paths)


def _sample(raw: Raw) -> tuple[bytes, str, str, dict[str, Any]]:
    """Picture, extension, caption, metadata, as they go into the shard. Raises BadSample where training would."""
    # NaN is no JSON; dates and decimals become text
    metadata = json.loads(json.dumps(raw.metadata, default=str), parse_constant=lambda _: None)
    members = {"jpg": raw.image, "json": json.dumps(metadata).encode()}
    members |= {} if raw.caption is None else {"txt": raw.caption}
    caption = DecodeSample(side=16, scaled_decode=1)("", members, 0)["caption"]
    picture = Image.open(io.BytesIO(raw.image), formats=FORMATS)
    if picture.format in _STORED:
        return raw.image, _STORED[picture.format], caption, metadata
    file = io.BytesIO()
    ImageOps.exif_transpose(picture).save(file, "PNG")
    return file.getvalue(), "png", caption, metadata


def _made(tar: Path, parquet: Path, stats: Path) -> Made:
    """Read back from the side files, so that shards of an earlier run count alike."""
    counts = json.loads(stats.read_text())
    dropped = Counter(counts["status_dict"])
    written = dropped.pop("success", 0)
    examples: dict[str, list[str]] = {}
    if dropped:
        for row in pq.read_table(parquet, columns=["error_message", "source_path"]).to_pylist():
            if reason := row["error_message"]:
                examples[reason] = [*examples.get(reason, []), row["source_path"]][:EXAMPLES]
    return Made(counts["count"], written, dropped, examples, [tar.stem] if written else [])


def show(made: Made, folder: str | Path, console: Console) -> None:
    """What was written, how to use it, and what was dropped and why."""
    console.print(
        f"[bold]{made.written:,}[/] of {made.items:,} items written to {len(made.shards):,} shards, "
        f"{made.items - made.written:,} dropped",
        highlight=False,
    )
    if made.dropped:
        rows = [(why, f"{n:,}", "\n".join(made.examples[why])) for why, n in made.dropped.most_common()]
        console.print(table(("dropped because", "items", "the first of them"), rows, "left"))
    if made.shards:
        shards = f"{Path(folder) / _braces(made.shards)}.tar"
        console.print(Text(f"train on them with  data.shards={shards}"), soft_wrap=True)


def _braces(numbers: list[str]) -> str:
    """00000 00001 00003 -> {{00000..00001},00003}: a shard of dropped items only is not there."""
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [run[0] if len(run) == 1 else f"{{{run[0]}..{run[-1]}}}" for run in runs]
    return texts[0] if len(texts) == 1 else f"{{{','.join(texts)}}}"
