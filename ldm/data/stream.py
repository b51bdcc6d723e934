"""An endless sequence of samples that is a function of (seed, shard list, filters) alone.

Not of ranks, of workers, or of when the run was stopped. How:

    slots      S = min(max_streams, shards of the smallest source). Position g = 0, 1, 2, ... takes the next usable sample of
               slot g % S, and g is the sample's index, which keys all its random draws. Unusable samples are skipped and
               counted.
    sources    of several sources, position g draws one by weight from (seed, g).
    streams    source k has one stream a slot, number k * S + slot. Each epoch of a source deals a fresh permutation of its
               shards: number j goes to slot j % S, so a stream walks shard after shard forever; `turn` counts the shards
               it has begun before.
    shuffle    within a shard, each block of `shuffle` samples is permuted. Pictures are decoded after that.
    ranks      rank r of W takes the positions g % W == r: with S a multiple of W, these are the slots s % W == r.
    ahead      while a stream reads a remote shard, its next one is fetched: shards of one length end together.
    workers    share a rank's slots; each gives its part of a batch, and the parts are put together by index.
    resume     a stream's cursor is (turn, position in the shard after shuffling): reading goes on from there.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ldm import keyed_random
from ldm.batch import Batch
from ldm.data.accounts import Tally
from ldm.data.decode import Decode, Fields
from ldm.data.manifest import Item, complete, expected
from ldm.data.remote import shown
from ldm.data.shards import BadSample, entries, read
from ldm.data.sources import ShardCache
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom


class Source(NamedTuple):
    """Shards, and how often a sample comes from them relative to the other sources."""

    paths: Sequence[str]
    weight: float = 1.0


class Place(NamedTuple):
    """What lies at one position of a stream."""

    path: str
    file: BinaryIO | None
    item: Item
    turn: int
    position: int  # after it


class Sample(NamedTuple):
    fields: Fields
    key: str
    index: int  # type: ignore[assignment]  # in place of tuple's
    cursor: tuple[int, int, int]


def count_streams(n_shards: int, max_streams: int, world: int) -> int:
    """S. Raises UserError where `world` ranks cannot share them evenly."""
    streams = min(max_streams, n_shards)
    if streams < world:
        raise UserError(
            f"{n_shards} shards and max_streams={max_streams} make {streams} streams, fewer than the {world} ranks; "
            f"use at least {world} of both"
        )
    if streams % world:
        raise UserError(
            f"{n_shards} shards make {streams} streams, which {world} ranks cannot share evenly; "
            f"set data.max_streams={streams - streams % world}"
        )
    return streams


@dataclass(eq=False)
class SampleStream(IterableDataset[Batch]):
    """Yields rank `rank`'s part of each batch, forever; inside a DataLoader worker, that worker's part of it.

    Args:
        sources: where samples come from.
        decode: what they become.
        seed: of the order.
        batch_size: samples of one batch over all ranks, a multiple of `world`.
        cache: opens shards; brings those of other machines here.
        shuffle: samples permuted together; 1 keeps each shard's order.
        start: samples delivered before, over all ranks.
        cursors: stream -> (turn, position) after them; a stream that is not there begins at its beginning.

    Raises:
        UserError: at construction for ranks that cannot share the streams; while reading when all shards of a stream
            together hold no usable sample.
    """

    sources: Sequence[Source]
    decode: Decode
    seed: int
    batch_size: int
    cache: ShardCache
    _: KW_ONLY
    shuffle: int = 1024
    max_streams: int = 64
    rank: int = 0
    world: int = 1
    start: int = 0
    cursors: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = count_streams(min(len(source.paths) for source in self.sources), self.max_streams, self.world)
        assert self.batch_size % self.world == 0
        self.bounds = list(accumulate(source.weight for source in self.sources))
        self.cursors = dict(self.cursors)  # the giver's go on

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        own = {s for s in range(self.rank, self.slots, self.world) if s // self.world % workers == number}
        walks: dict[int, Iterator[Place]] = {}
        first = self.start
        while True:
            drops = Tally()
            positions = [g for g in range(first, first + self.batch_size) if g % self.slots in own]
            yield collate([self._next(g, walks, drops) for g in positions], drops)
            first += self.batch_size

    def _next(self, index: int, walks: dict[int, Iterator[Place]], drops: Tally) -> Sample:
        stream = self._source(index) * self.slots + index % self.slots
        walk = walks.setdefault(stream, self._walk(stream))
        last_turn = None
        for place in walk:
            last_turn = last_turn or place.turn + self._shards_of(stream)
            try:
                key, fields = _load(place.path, place.file, place.item, self.decode, index)
            except BadSample as bad:
                drops.drop(bad)
            else:
                return Sample(fields, key, index, (stream, place.turn, place.position))
            if place.turn > last_turn:  # every shard was read from end to end: the next epoch would be the same
                raise UserError(
                    f"none of the {self._shards_of(stream)} shards of stream {stream} ({shown(place.path)!r}, ...) holds a "
                    f"usable sample; dropped: {dict(drops.dropped)}; check the shards and the filters"
                )
        raise AssertionError("a walk has no end")

    def _source(self, index: int) -> int:
        if len(self.sources) == 1:
            return 0
        draw = keyed_random.uniform(self.seed, index, "source") * self.bounds[-1]
        return next(k for k, bound in enumerate(self.bounds) if draw < bound)

    def _walk(self, stream: int) -> Iterator[Place]:
        """Everything that stream holds, from its cursor on, usable or not."""
        turn, done = self.cursors.get(stream, (0, 0))
        while True:
            path = self._shard(stream, turn)
            with opened(self.cache, path) as (file, items):
                for first in range(0, len(items), self.shuffle):
                    block = items[first : first + self.shuffle]
                    if first + len(block) > done:
                        order = _permutation(len(block), self.seed, f"samples/{stream}/{turn}/{first}")
                        for i in range(max(0, done - first), len(block)):
                            # at the second sample: when a run starts, the first shard of every stream comes before
                            if file and first + i == done + 1:
                                self.cache.fetch_ahead(self._shard(stream, turn + 1))
                            yield Place(path, file, block[order[i]], turn, first + i + 1)
            turn, done = turn + 1, 0

    def _shards_of(self, stream: int) -> int:
        k, slot = divmod(stream, self.slots)
        return len(range(slot, len(self.sources[k].paths), self.slots))

    def _shard(self, stream: int, turn: int) -> str:
        k, slot = divmod(stream, self.slots)
        epoch, number = divmod(turn, self._shards_of(stream))
        paths = self.sources[k].paths
        return paths[_shard_order(len(paths), self.seed, f"shards/{k}/{epoch}")[slot + number * self.slots]]


class OrderedSamples(Dataset[Batch]):
    """The first `limit` samples of some shards (all, if there are fewer), in order, once: for validation and reference.

    A sample's index is its place in the shards. An unusable sample keeps its place and is left out of its batch.
    """

    def __init__(self, paths: Sequence[str], decode: Decode, cache: ShardCache, limit: int | None = None) -> None:
        self.decode, self.cache = decode, cache
        self.places: list[tuple[str, Item]] = []
        for path in paths:
            with opened(cache, path) as (_, items):
                self.places += [(path, item) for item in items]
            if limit is not None and len(self.places) >= limit:
                break
        self.places = self.places[:limit]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch:
        """One sample as a batch of one, or of none when it is unusable. cursor: (0, 0, index)."""
        path, item = self.places[index]
        drops = Tally()
        samples: list[Sample] = []
        try:
            with self.cache.open(path) as file:
                key, fields = _load(path, file, item, self.decode, index)
            samples = [Sample(fields, key, index, (0, 0, index))]
        except BadSample as bad:
            drops.drop(bad)
        except OSError:
            drops.drop(BadSample("shard/unreadable"))
        return collate(samples, drops)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1, num_workers: int = 0) -> Iterator[Batch]:
        """Rank r's samples r, r + world, ...; no padding, so the last batch may be short and ranks may differ by one."""
        mine = list(range(rank, len(self), world))
        for batch in DataLoader(
            self, batch_size, sampler=mine, num_workers=num_workers, collate_fn=merge, generator=torch.Generator()
        ):
            if batch["key"]:
                yield batch


def batches(stream: SampleStream, num_workers: int) -> Iterator[Batch]:
    """The stream's batches, read by `num_workers` processes (0: this one). The same batches for any number."""
    chunks = read_batches(stream, num_workers)  # asks the workers in turn: num_workers chunks make one batch
    message = None
    while not message:
        try:
            parts = [next(chunks) for _ in range(max(1, num_workers))]
        except UserError as error:  # a worker's error arrives as a whole traceback; its last line is the message
            message = str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]
            error.__traceback__ = None  # a cycle through frames that hold the workers
        else:
            yield merge(parts)
    del chunks  # raised from in here, the error would keep the workers alive as long as its traceback
    raise UserError(message)


def read_batches(source: Dataset[Batch], num_workers: int, which: Iterable[Any] | None = None) -> Iterator[Batch]:
    """source[which[0]], source[which[1]], ... or its own sequence, read by `num_workers` processes in turn (0: this one)."""
    return iter(
        DataLoader(
            source,
            batch_size=None,
            sampler=which,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its own, or every epoch would take a draw from the global one
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def collate(samples: Sequence[Sample], drops: Tally) -> Batch:
    """Samples, perhaps none, and the drops met on the way -> one batch."""
    columns = {name: [sample.fields[name] for sample in samples] for name in (samples[0].fields if samples else ())}
    stacked: Any = {name: torch.stack(c) if isinstance(c[0], Tensor) else c for name, c in columns.items()}
    return Batch(
        **stacked,
        key=[sample.key for sample in samples],
        index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        cursor=torch.tensor([sample.cursor for sample in samples], dtype=torch.int64).reshape(-1, 3),
        dropped=dict(drops.dropped),
        dropped_where=drops.where,
    )


def merge(parts: Sequence[Batch]) -> Batch:
    """Parts of one batch -> the batch, in the order of the samples' indices."""
    if len(parts) == 1:
        return parts[0]
    drops = Tally()
    for part in parts:
        drops.add(0, part["dropped"], part["dropped_where"])
    full: list[Any] = [part for part in parts if part["key"]]
    if not full:
        return collate([], drops)
    order = torch.cat([part["index"] for part in full]).argsort()
    columns = {name: [part[name] for part in full] for name in full[0] if not name.startswith("dropped")}
    merged: Any = {name: _in_order(column, order) for name, column in columns.items()}
    return Batch(**merged, dropped=dict(drops.dropped), dropped_where=drops.where)


def _in_order(columns: Sequence[Any], order: Tensor) -> Any:
    """Columns, one after another, put in order."""
    if isinstance(columns[0], list):
        rows = [value for column in columns for value in column]
        return [rows[i] for i in order.tolist()]
    out = columns[0].new_empty(len(order), *columns[0].shape[1:])
    places = order.argsort().split([len(column) for column in columns])
    for column, place in zip(columns, places, strict=True):  # at once: cat and then index would copy twice
        out[place] = column
    return out


@contextmanager
def opened(cache: ShardCache, path: str) -> Iterator[tuple[BinaryIO | None, list[Item]]]:
    """One shard: the open file, and where its samples lie, one item for each that it should hold."""
    promised = None
    try:
        promised = expected(partial(cache.sidecar, path))
        file = cache.open(path)
    except (BadSample, OSError) as error:
        bad = error if isinstance(error, BadSample) else BadSample("shard/unreadable")
        yield None, complete([bad], promised)
        return
    with file:
        yield file, complete(list(entries(file)), promised)


def _load(path: str, file: BinaryIO | None, item: Item, decode: Decode, index: int) -> tuple[str, Fields]:
    """Raises BadSample, which says where."""
    key = "-"
    try:
        if isinstance(item, BadSample):
            raise BadSample(item.reason)
        assert file is not None
        key = item.key
        return key, decode(key, read(file, item), index)
    except BadSample as bad:
        bad.where = f"{shown(path)}: {key}"
        raise


def _permutation(n: int, seed: int, purpose: str) -> list[int]:
    return KeyedRandom(seed, torch.arange(n)).uniform(purpose).argsort(stable=True).tolist()


_shard_order = lru_cache(maxsize=16)(_permutation)  # the streams of a process are within an epoch or two of each other
