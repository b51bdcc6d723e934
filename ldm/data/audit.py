"""What shards hold, and what training would drop of them: `ldm shards check`, `index` and `stats`."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import iadd
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ldm.data.decode import DecodeSample
from ldm.data.manifest import Item, complete, expected
from ldm.data.parallel import in_parallel
from ldm.data.remote import scheme_of, shown
from ldm.data.schema import normalize, parse
from ldm.data.shards import BadSample, Entry, entries, read
from ldm.data.sources import expand
from ldm.data.transforms import EXTENSIONS, FORMATS, DecodeImage, Frame, Picture
from ldm.errors import UserError
from ldm.files import aside, sha256

DAMAGE_SHOWN = 20
SMALL = (256, 512)  # pixels of the shorter side, below which pictures are counted
SCORES = ("similarity", "aesthetic", "pwatermark", "punsafe")


class Sample(NamedTuple):
    """One usable sample. picture, caption: the first 8 bytes of their sha256, as a number."""

    key: str
    picture: int
    caption: int
    width: int  # pixels, as stored
    height: int
    characters: int
    words: int


class Damage(NamedTuple):
    """Something training would drop."""

    shard: str
    where: str  # the key, or the key after which it lies
    reason: str


@dataclass
class Audit:
    """Of one shard or of many; usable + dropped = items."""

    samples: list[Sample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    damage: list[Damage] = field(default_factory=list)
    extensions: Counter[str] = field(default_factory=Counter)  # members seen
    fields: Counter[str] = field(default_factory=Counter)  # .json fields that are not null, in usable samples
    scores: dict[str, list[float]] = field(default_factory=dict)
    decoded: bool = True  # else the pictures were taken at their headers' word
    shards: int = 0
    bytes: int = 0
    promised: int = 0  # samples, by the manifests there are
    without_manifest: int = 0  # shards
    altered: list[str] = field(default_factory=list)  # shards that are not what their index says

    @property
    def items(self) -> int:
        return len(self.samples) + self.dropped.total()

    @property
    def clean(self) -> bool:
        return not self.dropped and not self.altered

    def add(self, other: "Audit") -> None:
        """Another's findings after one's own."""
        for name in _SUMMED:
            setattr(self, name, iadd(getattr(self, name), getattr(other, name)))
        del self.damage[DAMAGE_SHOWN:]
        for name, values in other.scores.items():
            self.scores.setdefault(name, []).extend(values)


_SUMMED = ("samples", "dropped", "damage", "extensions", "fields", "altered", "shards", "bytes", "promised",
           "without_manifest")  # fmt: skip


def local_shards(spec: str | Sequence[str]) -> list[str]:
    """Like `expand`, for paths only."""
    paths = expand(spec)
    remote = [path for path in paths if scheme_of(path)]
    if remote:
        raise UserError(f"shard {shown(remote[0])!r} is not a local path; copy the shards here and give their paths")
    return paths


def audit(paths: Sequence[str], decode: bool = True, workers: int | None = None) -> Audit:
    """Reads every sample as training would.

    Args:
        decode: decode the pictures too; otherwise only their headers are read.
        workers: processes; 1: this one; None: one a core.
    """
    total = Audit(decoded=decode)
    for part in in_parallel(partial(_audit_shard, decode), paths, workers, "checking"):
        total.add(part)
    return total


def index(paths: Sequence[str], workers: int | None = None) -> list[Damage]:
    """Writes NNNNN.index.json beside each sound shard: its count of samples, its bytes and their sha256.

    Returns the damage found: a damaged shard gets no index, for that would vouch for it.
    """
    return [damage for found in in_parallel(_index_shard, paths, workers, "indexing") for damage in found]


class _ByHeader(DecodeImage):
    """Takes a picture at its header's word."""

    def __call__(self, data: bytes, index: int) -> Picture:
        return Picture(torch.empty(0), _size(data)[::-1], Frame(0, (0, 0), (0, 0), mirrored=False))


def _walk(file: BinaryIO, promised: int | None) -> Iterator[tuple[str, Item]]:
    """What a shard holds, and where: at a key, or after one."""
    before = "the beginning"
    for item in complete(list(entries(file)), promised):
        if isinstance(item, Entry):
            before = item.key
        yield item.key if isinstance(item, Entry) else f"after {before}", item


def _audit_shard(decode: bool, path: str) -> Audit:
    reader, promised = DecodeSample(side=16, scaled_decode=1), _promised(path)
    if not decode:
        reader.image = _ByHeader(16)
    out = Audit(shards=1, bytes=os.path.getsize(path), promised=promised or 0, without_manifest=int(promised is None))
    out.altered = [path] if _altered(path) else []
    with open(path, "rb") as file:
        for where, item in _walk(file, promised):
            try:
                if isinstance(item, BadSample):
                    raise item
                out.extensions.update(list(item.members))
                members = read(file, item)
                _note(out, item.key, members, reader(item.key, members, 0)["caption"])
            except BadSample as bad:
                out.dropped[bad.reason] += 1
                _list(out.damage, Damage(path, where, bad.reason))
    return out


def _list(damage: list[Damage], one: Damage) -> None:
    """Samples that are missing in one place are one line."""
    if len(damage) < DAMAGE_SHOWN and one not in damage:
        damage.append(one)


def _note(out: Audit, key: str, members: dict[str, bytes], caption: str) -> None:
    picture = next(members[extension] for extension in EXTENSIONS if extension in members)
    hashes = (_hash(picture), _hash(caption.encode()))
    out.samples.append(Sample(key, *hashes, *_size(picture), len(caption), len(caption.split())))
    row = parse(members.get("json"))
    out.fields.update(name for name, value in row.items() if value is not None)
    record: Mapping[str, Any] = normalize(row)
    for name in SCORES:
        if name in record:
            out.scores.setdefault(name, []).append(record[name])


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height by the header. Raises BadSample."""
    try:
        return Image.open(io.BytesIO(picture), formats=FORMATS).size
    except Exception as error:  # Pillow's readers raise nearly anything on bad bytes
        raise BadSample("image/not an image") from error


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _beside(path: str, ending: str) -> Path:
    return Path(os.path.splitext(path)[0] + ending)


def _promised(path: str) -> int | None:
    def sidecar(ending: str) -> bytes | None:
        file = _beside(path, ending)
        return file.read_bytes() if file.is_file() else None

    return expected(sidecar)


def _altered(path: str) -> bool:
    """Is there an index, and does it tell of other bytes?"""
    try:
        said = json.loads(_beside(path, ".index.json").read_bytes())
        return (said["bytes"], said["sha256"]) != (os.path.getsize(path), sha256(path))
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        return True


def _index_shard(path: str) -> list[Damage]:
    damage: list[Damage] = []
    with open(path, "rb") as file:
        items = list(_walk(file, _promised(path)))
    for where, item in items:
        if isinstance(item, BadSample):
            _list(damage, Damage(path, where, item.reason))
    if _altered(path):
        damage.append(Damage(path, "anywhere", "shard/altered since it was indexed"))
    if not damage:
        manifest = {"count": len(items), "bytes": os.path.getsize(path), "sha256": sha256(path)}
        with aside(_beside(path, ".index.json")) as partial:
            partial.write_text(json.dumps(manifest))
    return damage


def _repeats(samples: Sequence[Sample], name: str) -> np.ndarray:
    """Positions of the samples whose value was there before."""
    values = np.array([getattr(sample, name) for sample in samples])
    first = np.unique(values, return_index=True)[1]
    return np.setdiff1d(np.arange(len(values)), first)


def write_duplicates(samples: Sequence[Sample], path: str | Path) -> int:
    """One key a line, as the filter `NotListed` reads it; returns how many.

    Raises:
        UserError: keys that occur twice, so that a list of keys would also exclude first copies.
    """
    again = _repeats(samples, "key")
    if len(again):
        raise UserError(
            f"{len(again)} keys occur more than once ({samples[again[0]].key!r}, ...), so a list of keys cannot tell copies "
            "apart; check data sets with keys of their own one by one"
        )
    copies = _repeats(samples, "picture")
    Path(path).write_text("".join(f"{samples[i].key}\n" for i in copies))
    return len(copies)


def summary(found: Audit) -> dict[str, Any]:
    """All of an audit as plain data. Sizes are in pixels, coverages are shares of the usable samples."""
    samples, usable = found.samples, len(found.samples)
    shorter = np.array([min(sample.width, sample.height) for sample in samples])
    return {
        "clean": found.clean,
        "decoded": found.decoded,
        "shards": found.shards,
        "bytes": found.bytes,
        "samples": found.items,
        "usable": usable,
        "promised": found.promised,
        "shards_without_manifest": found.without_manifest,
        "altered_shards": found.altered,
        "dropped": dict(found.dropped.most_common()),
        "damage": [damage._asdict() for damage in found.damage],
        **{name: _spread([getattr(s, name) for s in samples]) for name in ("width", "height", "characters", "words")},
        "under": {str(side): int((shorter < side).sum()) for side in SMALL},
        "duplicate_pictures": len(_repeats(samples, "picture")),
        "duplicate_captions": len(_repeats(samples, "caption")),
        "duplicate_keys": len(_repeats(samples, "key")),
        "extensions": dict(found.extensions.most_common()),
        "fields": {name: count / usable for name, count in found.fields.most_common()},
        "scores": {name: _spread(found.scores[name]) for name in SCORES if name in found.scores},
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def show(said: dict[str, Any], console: Console) -> None:
    """A `summary` as a person reads it."""
    usable, samples = said["usable"], said["samples"]
    verdict = f"[green]all {samples:,} usable[/]" if usable == samples else f"[red]{usable:,} usable[/]"
    console.print(
        f"[bold]{samples:,}[/] samples in {said['shards']:,} shards ({said['bytes'] / 1e6:,.1f} MB): {verdict}"
        + ("" if said["decoded"] else " by the pictures' headers"),
        highlight=False,
    )
    if lacking := said["shards_without_manifest"]:
        console.print(f"{lacking:,} shards have no manifest: a cut between two samples would not show", highlight=False)
    for path in said["altered_shards"]:
        console.print(Text(f"{path} is not what its index says", style="red"))
    if usable:
        sizes = {
            "width, px": "width",
            "height, px": "height",
            "caption, characters": "characters",
            "caption, words": "words",
        }
        spreads = {label: said[name] for label, name in sizes.items()} | said["scores"]
        rows = [(label, *(f"{value:,.5g}" for value in spread.values())) for label, spread in spreads.items()]
        console.print(table(("", "min", "median", "max"), rows))
        counts = {f"shorter side under {side} px": count for side, count in said["under"].items()}
        counts |= {f"{name} seen before": said[f"duplicate_{name}s"] for name in ("picture", "caption", "key")}
        shares = [(label, f"{count:,}", f"{count / usable:.1%}") for label, count in counts.items()]
        console.print(table(("", "samples", "share"), shares))
        console.print(_members(said))
    if said["dropped"]:
        rows = [(reason, f"{count:,}") for reason, count in said["dropped"].items()]
        console.print(table(("dropped because", "samples"), rows))
    show_damage(said["damage"], console)


def show_damage(damage: Sequence[dict[str, str]], console: Console) -> None:
    """The first of it, where there is any."""
    if damage:
        console.print(table(("shard", "key", "damage"), [tuple(each.values()) for each in damage], "left"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], others: JustifyMethod = "right") -> Table:
    """others: where the columns after the first are aligned."""
    out = Table(box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        out.add_column(name, justify=others if i else "left", overflow="fold")
    for row in rows:
        out.add_row(*map(Text, row))
    return out


def _members(said: dict[str, Any]) -> Table:
    always = [name for name, share in said["fields"].items() if share == 1]
    some = [f"{name} {share:.1%}" for name, share in said["fields"].items() if share < 1]
    members = [f"{name} {count:,}" for name, count in said["extensions"].items()]
    grid = Table.grid(padding=(0, 2))
    for label, names in (("members", members), ("metadata of all", always), ("metadata of some", some)):
        if names:
            grid.add_row(f"  {label}", Text(", ".join(names)))
    return grid
