"""The latent cache as arrays: one memory-mapped file a column, read row by row at random. For local disks and RAM, where
taking tars apart is what limits training; tars are for streaming.

    moments.npy                 (N, F, 2z, h, w) float16
    places.npy                  (N, 4) int32: original height and width, crop's top and left
    keys.bin, keys.npy          UTF-8, one after another; (N,) int64, where each ends
    captions.bin, captions.npy  likewise
    tokens.npy, token_ends.npy  (M, D) float16, the captions' real tokens one after another; (N,) int64   } where text was
    vectors.npy                 (N, V) float16                                                            } encoded
    cache.json, null.*          as beside the tars; the stamp is written last: then all is there

The sequence is a function of (seed, N): position g holds row p[g % N] of the permutation p of epoch g // N. Nothing else needs
to be known to resume, on any number of ranks and workers.
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.batch import Batch
from ldm.data.accounts import Tally
from ldm.data.decode import Fields
from ldm.data.latents import DecodeLatents, Stamp, TextStamp, finite, from_npy
from ldm.data.sources import ShardCache, expand
from ldm.data.stream import OrderedSamples, read_batches
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom


class LatentArrays:
    """The columns of one folder, opened but not read. Made by `ldm shards pack`.

    Raises:
        UserError: not there, or columns of different lengths.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.stamp = Stamp.read(folder, "ldm shards pack")
        try:
            moments = self._column("moments")
            self.moments = moments.reshape(-1, math.prod(moments.shape[2:]))  # view v of row i is row i * F + v
            self.places = self._column("places")
            self.keys, self.captions = _Strings(self.folder, "keys"), _Strings(self.folder, "captions")
            if self.stamp.text:
                self.tokens, self.vectors = self._column("tokens"), self._column("vectors")
                self.token_ends = self._column("token_ends")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no whole arrays ({error}); make them with ldm shards pack") from None
        lengths = {len(moments), len(self.places), len(self.keys), len(self.captions)}
        lengths |= {len(self.vectors), len(self.token_ends)} if self.stamp.text else set()
        if len(lengths) != 1 or moments.shape[1:] != self.stamp.moments:
            raise UserError(f"{folder}: its arrays do not fit each other; make them again with ldm shards pack")

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentArrays, (self.folder,)  # a process that is not forked opens them again, and does not copy them

    def batch(self, rows: np.ndarray, index: Tensor, cursor: Tensor, mirrored: Tensor | None = None) -> Batch:
        """rows: (B,) int64; index, cursor: see Batch; mirrored: (B,) bool, None: none is."""
        views, *shape = self.stamp.moments
        chosen = rows * views + (0 if mirrored is None else mirrored.numpy())
        places = torch.from_numpy(self.places[rows]).long()
        text: Any = self._text(self.stamp.text, rows) if self.stamp.text else {}
        return Batch(
            # take: faster than torch.s index_select, which also wants memory that it may write to
            moments=torch.from_numpy(self.moments.take(chosen, 0)).view(-1, *shape),
            caption=self.captions[rows],
            key=self.keys[rows],
            index=index,
            cursor=cursor,
            original_size=places[:, :2],
            crop=places[:, 2:],
            dropped={},
            dropped_where={},
            **text,
        )

    def _text(self, text: TextStamp, rows: np.ndarray) -> dict[str, Tensor]:
        starts, ends = _spans(self.token_ends, rows)
        tokens = np.zeros((len(rows), text.length, text.width), np.float16)
        for row, start, end in zip(tokens, starts.tolist(), ends.tolist(), strict=True):
            row[: end - start] = self.tokens[start:end]
        mask = np.arange(text.length) < (ends - starts)[:, None]
        columns = {"text_tokens": tokens, "text_mask": mask, "text_vector": self.vectors[rows]}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def _column(self, name: str) -> np.ndarray:
        column = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="r")
        return np.asarray(column)  # of numpy's own class, whose slices are made faster


class _Strings:
    """A column of texts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ends = np.array(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r"))
        with (folder / f"{name}.bin").open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self.data) != self.ends[-1]:
            raise ValueError(f"{name}.bin is of another length than {name}.npy says")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: np.ndarray) -> list[str]:
        starts, ends = _spans(self.ends, rows)
        return [str(self.data[a:b], "utf-8", "replace") for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def _spans(ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(rows > 0, ends[rows - 1], 0), ends[rows]


@dataclass(eq=False)
class ArrayStream(Dataset[Batch]):
    """Batch n of the endless sequence, from `start` on: rank r's part of it.

    Args:
        arrays: the columns.
        count: rows that are trained on, from the first.
        seed: of the order and the flips.
        batch_size: samples of one batch over all ranks, a multiple of `world`.
        random_flip: mirror half of the samples.
        start: samples delivered before, over all ranks.
    """

    arrays: LatentArrays
    count: int
    seed: int
    batch_size: int
    _: KW_ONLY
    random_flip: bool = False
    rank: int = 0
    world: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        assert self.batch_size % self.world == 0

    def __getitem__(self, number: int) -> Batch:
        first = self.start + number * self.batch_size
        mine = first + (self.rank - first) % self.world  # position g is rank g % world's, as in stream.py
        positions = np.arange(mine, first + self.batch_size, self.world)
        epochs, places = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _order(self.count, self.seed, int(epoch))[places[here]]
        index = torch.from_numpy(positions)
        cursor = torch.from_numpy(np.stack([np.zeros_like(epochs), epochs, places + 1], axis=1))
        mirrored = KeyedRandom(self.seed, index).uniform("flip") < 0.5 if self.random_flip else None
        return self.arrays.batch(rows, index, cursor, mirrored)


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: the permutation of that epoch."""
    return KeyedRandom(seed, torch.arange(n)).uniform(f"rows/{epoch}").argsort(stable=True).numpy()


class OrderedRows(Dataset[Batch]):
    """Rows first, first + 1, ... of the arrays, in order, once: for validation. A sample's index is its place among them."""

    def __init__(self, arrays: LatentArrays, first: int) -> None:
        self.arrays, self.first = arrays, first

    def __len__(self) -> int:
        return len(self.arrays) - self.first

    def __getitem__(self, index: Sequence[int]) -> Batch:
        """A batch of these places."""
        places = np.asarray(index, dtype=np.int64)
        zeros = np.zeros_like(places)
        cursor = torch.from_numpy(np.stack([zeros, zeros, places], axis=1))
        return self.arrays.batch(places + self.first, torch.from_numpy(places), cursor)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1, num_workers: int = 0) -> Iterator[Batch]:
        """Rank r's samples r, r + world, ...; no padding, so the last batch may be short and ranks may differ by one."""
        mine = list(range(rank, len(self), world))
        return read_batches(self, num_workers, [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)])


def pack(cache: str | Path, out: str | Path, shard_cache: ShardCache) -> Tally:
    """The tars of a latent cache -> arrays in `out`. Returns what was packed, and what was dropped and why.

    Raises:
        UserError: the cache is not there, not complete, or without a usable sample; `out` holds arrays already.
    """
    cache, out = Path(cache), Path(out)
    stamp = Stamp.read(cache)
    if (out / "cache.json").exists():
        raise UserError(f"{out} holds a cache already: give another folder, or delete it")
    shards = expand(f"{cache}/{{00000..{stamp.shards - 1:05d}}}.tar", "ldm shards encode")
    out.mkdir(parents=True, exist_ok=True)
    samples = OrderedSamples(shards, _AllViews(str(cache), stamp.side), shard_cache)
    tally = Tally()
    with closing(_Columns(out, stamp)) as columns:
        for place in range(len(samples)):
            batch = samples[place]
            tally.add(len(batch["key"]), batch["dropped"], batch["dropped_where"])
            if batch["key"]:
                columns.add(batch)
    if not tally.delivered:
        raise UserError(f"{cache} holds no usable sample; dropped: {dict(tally.dropped)}")
    for path in cache.glob("null.*.npy"):
        (out / path.name).write_bytes(path.read_bytes())
    stamp.write(out)
    return tally


class _AllViews(DecodeLatents):
    """Mirrored or not is drawn when the arrays are read."""

    def __call__(self, key: str, members: dict[str, bytes], index: int) -> Fields:
        fields = super().__call__(key, members, index)
        views = finite(from_npy(members[self.stamp.name()], self.stamp.moments))
        return fields | {"moments": torch.from_numpy(views.copy())}


class _Columns:
    """Writes the columns, sample after sample."""

    def __init__(self, out: Path, stamp: Stamp) -> None:
        self.text = stamp.text
        shapes: dict[str, tuple[tuple[int, ...], str]] = {"moments": (stamp.moments, "<f2"), "places": ((4,), "<i4")}
        shapes |= {"keys": ((), "<i8"), "captions": ((), "<i8")}
        if stamp.text:
            shapes |= {"tokens": ((stamp.text.width,), "<f2"), "token_ends": ((), "<i8")}
            shapes |= {"vectors": ((stamp.text.pooled,), "<f2")}
        self.columns = {name: _Column(out / f"{name}.npy", *shape) for name, shape in shapes.items()}
        self.strings = {name: (out / f"{name}.bin").open("wb") for name in ("keys", "captions")}

    def add(self, batch: Batch) -> None:
        """A batch of one."""
        self.columns["moments"].add(batch["moments"].numpy())
        self.columns["places"].add(torch.cat([batch["original_size"], batch["crop"]], dim=1).numpy())
        for name, text in (("keys", batch["key"][0]), ("captions", batch["caption"][0])):
            self.strings[name].write(text.encode())
            self.columns[name].add(np.array([self.strings[name].tell()]))
        if self.text:
            self.columns["tokens"].add(batch["text_tokens"][batch["text_mask"]].numpy())
            self.columns["token_ends"].add(np.array([self.columns["tokens"].rows]))
            self.columns["vectors"].add(batch["text_vector"].numpy())

    def close(self) -> None:
        for column in self.columns.values():
            column.close()
        for file in self.strings.values():
            file.close()


class _Column:
    """A .npy file that grows row by row. shape: of one row."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.file, self.shape, self.dtype, self.rows = path.open("wb"), shape, dtype, 0
        self._header()

    def add(self, rows: np.ndarray) -> None:
        """rows: (n, *shape)."""
        assert rows.shape[1:] == self.shape
        self.file.write(rows.astype(self.dtype).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()

    def _header(self) -> None:
        """numpy leaves room in it for the first number to grow."""
        header = {"descr": self.dtype, "fortran_order": False, "shape": (self.rows, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)
