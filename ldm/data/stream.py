"""An endless sequence of samples that is a function of (seed, shard list) alone.

Not of ranks, of workers, or of when the run was stopped. How:

    streams    S = min(max_streams, shards). Each epoch deals a fresh permutation of the shards: number j goes to stream
               j % S, so a stream walks shard after shard forever; `turn` counts the shards it has begun before.
    shuffle    within a shard, each block of `shuffle` samples is permuted. Pictures are decoded after that.
    sequence   position g = 0, 1, 2, ... takes the next usable sample of stream g % S, and g is the sample's index, which
               keys all its random draws. Unusable samples are skipped and counted.
    ranks      rank r of W takes the positions g % W == r: with S a multiple of W, it reads the streams s % W == r.
    workers    share a rank's streams; each gives its part of a batch, and the parts are put together by index.
    resume     a stream's cursor is (turn, position in the shard after shuffling): reading goes on from there.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import BinaryIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ldm.batch import Batch
from ldm.data.shards import BadSample, Entry, entries, read
from ldm.data.transforms import DecodeImage, decode_sample
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom

Sample = tuple[Tensor, str, str, int, tuple[int, int, int]]  # image, caption, key, index, cursor
Slot = tuple[BinaryIO | None, Entry | BadSample, int, int]  # file, what lies there, turn, position after it


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


class SampleStream(IterableDataset[Batch]):
    """Yields rank `rank`'s part of each batch, forever; inside a DataLoader worker, that worker's part of it.

    Args:
        paths: the shards.
        decode: bytes -> (3, H, W) uint8.
        seed: of the order.
        batch_size: samples of one batch over all ranks, a multiple of `world`.
        shuffle: samples permuted together; 1 keeps each shard's order.
        start: samples delivered before, over all ranks.
        cursors: stream -> (turn, position) after them; a stream that is not there begins at its beginning.

    Raises:
        UserError: at construction for ranks that cannot share the streams; while reading when all shards of a stream
            together hold no usable sample.
    """

    def __init__(
        self,
        paths: Sequence[str],
        decode: DecodeImage,
        seed: int,
        batch_size: int,
        *,
        shuffle: int = 1024,
        max_streams: int = 64,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        cursors: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self.streams = count_streams(len(paths), max_streams, world)
        assert batch_size % world == 0
        self.paths = list(paths)
        self.decode = decode
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = max(1, shuffle)
        self.rank = rank
        self.world = world
        self.start = start
        self.cursors = dict(cursors or {})

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        own = [s for s in range(self.rank, self.streams, self.world) if s // self.world % workers == number]
        walks = {s: self._walk(s) for s in own}
        first = self.start
        while True:
            dropped: Counter[str] = Counter()
            positions = [g for g in range(first, first + self.batch_size) if g % self.streams in walks]
            yield collate([self._next(g, walks[g % self.streams], dropped) for g in positions], dropped)
            first += self.batch_size

    def _next(self, index: int, walk: Iterator[Slot], dropped: Counter[str]) -> Sample:
        stream = index % self.streams
        last_turn = None
        for file, entry, turn, position in walk:
            last_turn = last_turn or turn + self._shards_of(stream)
            try:
                key, image, caption = _load(file, entry, self.decode, index)
            except BadSample as bad:
                dropped[bad.reason] += 1
            else:
                return image, caption, key, index, (stream, turn, position)
            if turn > last_turn:  # every shard was read from end to end: the next epoch would be the same
                raise UserError(
                    f"none of the {self._shards_of(stream)} shards of stream {stream} ({self._shard(stream, turn)!r}, "
                    f"...) holds a usable sample; dropped: {dict(dropped)}; check the shards"
                )
        raise AssertionError("a walk has no end")

    def _walk(self, stream: int) -> Iterator[Slot]:
        """Everything that stream holds, from its cursor on, usable or not."""
        turn, done = self.cursors.get(stream, (0, 0))
        while True:
            first = 0
            for number, (file, block) in enumerate(_blocks(self._shard(stream, turn), self.shuffle)):
                if first + len(block) > done:
                    order = _permutation(len(block), self.seed, f"samples/{stream}/{turn}/{number}")
                    for i in range(max(0, done - first), len(block)):
                        yield file, block[order[i]], turn, first + i + 1
                first += len(block)
            turn, done = turn + 1, 0

    def _shards_of(self, stream: int) -> int:
        return len(range(stream, len(self.paths), self.streams))

    def _shard(self, stream: int, turn: int) -> str:
        epoch, number = divmod(turn, self._shards_of(stream))
        return self.paths[_shard_order(len(self.paths), self.seed, epoch)[stream + number * self.streams]]


class OrderedSamples(Dataset[Batch]):
    """The first `limit` samples of some shards (all, if there are fewer), in order, once: for validation and reference.

    A sample's index is its place in the shards. An unusable sample keeps its place and is left out of its batch.
    """

    def __init__(self, paths: Sequence[str], decode: DecodeImage, limit: int | None = None) -> None:
        self.decode = decode
        self.places: list[tuple[str, Entry | BadSample]] = []
        for path in paths:
            for _, block in _blocks(path, 1024):
                self.places += [(path, entry) for entry in block]
            if limit is not None and len(self.places) >= limit:
                break
        self.places = self.places[:limit]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch:
        """One sample as a batch of one, or of none when it is unusable. cursor: (0, 0, index)."""
        path, entry = self.places[index]
        dropped: Counter[str] = Counter()
        samples: list[Sample] = []
        try:
            with open(path, "rb") as file:
                key, image, caption = _load(file, entry, self.decode, index)
            samples = [(image, caption, key, index, (0, 0, index))]
        except BadSample as bad:
            dropped[bad.reason] += 1
        except OSError:
            dropped["shard/unreadable"] += 1
        return collate(samples, dropped)

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
    num_workers = min(num_workers, stream.streams // stream.world)  # one more would have nothing to read
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its own, or every epoch would take a draw from the global one
    )
    chunks = iter(loader)  # asks the workers in turn: num_workers chunks make one batch
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


def collate(samples: Sequence[Sample], dropped: Mapping[str, int]) -> Batch:
    """Samples, perhaps none, and the drops met on the way -> one batch."""
    return Batch(
        image=torch.stack([s[0] for s in samples]) if samples else torch.empty(0, dtype=torch.uint8),
        caption=[s[1] for s in samples],
        key=[s[2] for s in samples],
        index=torch.tensor([s[3] for s in samples], dtype=torch.int64),
        cursor=torch.tensor([s[4] for s in samples], dtype=torch.int64).reshape(-1, 3),
        dropped=dict(dropped),
    )


def merge(parts: Sequence[Batch]) -> Batch:
    """Parts of one batch -> the batch, in the order of the samples' indices."""
    if len(parts) == 1:
        return parts[0]
    index, order = torch.cat([part["index"] for part in parts]).sort()
    full = [part for part in parts if part["key"]]
    image = torch.empty(len(index), *(full[0]["image"].shape[1:] if full else ()), dtype=torch.uint8)
    for part in full:  # into place at once: cat and then index would copy every picture twice
        image[torch.searchsorted(index, part["index"])] = part["image"]
    captions = [caption for part in parts for caption in part["caption"]]
    keys = [key for part in parts for key in part["key"]]
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part["dropped"])
    return Batch(
        image=image,
        caption=[captions[i] for i in order.tolist()],
        key=[keys[i] for i in order.tolist()],
        index=index,
        cursor=torch.cat([part["cursor"] for part in parts])[order],
        dropped=dict(dropped),
    )


def _load(file: BinaryIO | None, entry: Entry | BadSample, decode: DecodeImage, index: int) -> tuple[str, Tensor, str]:
    if isinstance(entry, BadSample):
        raise entry
    assert file is not None
    return entry.key, *decode_sample(read(file, entry), decode, index)


def _blocks(path: str, size: int) -> Iterator[tuple[BinaryIO | None, list[Entry | BadSample]]]:
    """One shard's samples, `size` at a time; the file stays open until the next shard. Only offsets are held."""
    try:
        file = open(path, "rb")  # noqa: SIM115  closed below; here only a failure to open counts
    except OSError:
        yield None, [BadSample("shard/unreadable")]
        return
    with file:
        places = entries(file)
        while block := list(islice(places, size)):
            yield file, block


def _permutation(n: int, seed: int, purpose: str) -> list[int]:
    return KeyedRandom(seed, torch.arange(n)).uniform(purpose).argsort(stable=True).tolist()


@lru_cache(maxsize=4)  # the streams of a process are within an epoch or two of each other
def _shard_order(n: int, seed: int, epoch: int) -> list[int]:
    return _permutation(n, seed, f"shards/{epoch}")


def _as_it_is(chunk: Batch) -> Batch:
    return chunk
