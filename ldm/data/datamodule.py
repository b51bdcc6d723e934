"""Shards as a LightningDataModule whose position in the data is what the training steps have consumed."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import distributed

from ldm.batch import Batch
from ldm.data.shards import expand
from ldm.data.stream import OrderedSamples, SampleStream, batches, count_streams
from ldm.data.transforms import DecodeImage
from ldm.errors import UserError

Progress = tuple[dict[int, tuple[int, int]], Counter[str]]  # stream -> (turn, position); drops by reason


class ShardDataModule(pl.LightningDataModule):
    """Training: an endless, shuffled, resumable stream (see stream.py). Validation: the first samples, in order, once.

    Args:
        shards: local paths with brace ranges, such as data/{00000..00012}.tar.
        val_shards: likewise; None: the last of `shards` is held out from training for validation.
        side: pictures come as uint8 (B, 3, side, side).
        batch_size: samples of one optimizer step, over all ranks and accumulation steps.
        steps: optimizer steps of the whole run. The training loader is that long: Lightning loses a batch at every
            resume of a loader without a length.
        seed: of the order and of the flips.
        val_batch_size: of one rank.
        val_samples: at most so many samples of val_shards are read; None: all.
        accumulate: micro-batches of one optimizer step.
        num_workers: reading processes of one rank; they change nothing but the speed.
        shuffle: samples permuted together within a shard; 1: none.
        max_streams: shards read at the same time, over all ranks.
        random_flip: mirror half of the training pictures.
        how_to_make: the command that makes the shards, told when one is missing.

    Call `consumed(batch)` after every training step: that is the position which the checkpoint holds.

    Raises:
        UserError: a number out of range (here), a missing shard, ranks that cannot share the work (in `setup`).
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        val_shards: str | Sequence[str] | None,
        side: int,
        batch_size: int,
        steps: int,
        seed: int,
        val_batch_size: int,
        val_samples: int | None = None,
        accumulate: int = 1,
        num_workers: int = 0,
        shuffle: int = 1024,
        max_streams: int = 64,
        random_flip: bool = False,
        how_to_make: str | None = None,
    ) -> None:
        super().__init__()
        numbers = {"side": side, "batch_size": batch_size, "steps": steps, "val_batch_size": val_batch_size}
        numbers |= {"accumulate": accumulate, "shuffle": shuffle, "max_streams": max_streams}
        if val_samples is not None:
            numbers["val_samples"] = val_samples
        for name, value in numbers.items():
            if value < 1:
                raise UserError(f"data.{name}={value}; expected 1 or more")
        if num_workers < 0:
            raise UserError(f"data.num_workers={num_workers}; expected 0 (read in the training process) or more")
        self.shards = shards
        self.val_shards = val_shards
        self.side = side
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.val_batch_size = val_batch_size
        self.val_samples = val_samples
        self.accumulate = accumulate
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.max_streams = max_streams
        self.random_flip = random_flip
        self.how_to_make = how_to_make
        self.samples_seen = 0  # over all ranks
        self.batches_seen = 0  # micro-batches of each rank
        self._cursors: dict[int, tuple[int, int]] = {}  # of this rank's streams; after a load, of all
        self._dropped: Counter[str] = Counter()  # by this rank since the load
        self._dropped_before: Counter[str] = Counter()  # by all ranks before it

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> samples that could not be used so far; on several ranks without the others' since the last load."""
        return dict(self._dropped_before + self._dropped)

    @cached_property
    def paths(self) -> list[str]:
        """The training shards."""
        paths = expand(self.shards, self.how_to_make)
        if self.val_shards is None and len(paths) < 2:
            raise UserError(
                f"data.shards={self.shards!r} is one shard; give one more to hold out, or data.val_shards=..."
            )
        return paths if self.val_shards is not None else paths[:-1]

    @cached_property
    def val_paths(self) -> list[str]:
        """The validation shards."""
        if self.val_shards is None:
            return expand(self.shards, self.how_to_make)[-1:]
        return expand(self.val_shards, self.how_to_make)

    @cached_property
    def val(self) -> OrderedSamples:
        """The validation samples."""
        return OrderedSamples(self.val_paths, DecodeImage(self.side), self.val_samples)

    def setup(self, stage: str) -> None:
        """Find what is wrong with the data before the first step."""
        if stage == "fit":
            _, world = self._rank_and_world()
            share = world * self.accumulate
            if self.batch_size % share:
                raise UserError(
                    f"data.batch_size={self.batch_size} cannot be split over {world} ranks x {self.accumulate} "
                    f"accumulation steps; use a multiple of {share}"
                )
            count_streams(len(self.paths), self.max_streams, world)
        assert len(self.val) > 0

    def train_dataloader(self) -> "Loader":
        """`steps * accumulate` batches in all, from the first not yet consumed when it is iterated."""
        return Loader(self._train_batches, self.steps * self.accumulate)

    def val_dataloader(self) -> "Loader":
        """This rank's share of the validation samples."""
        rank, world = self._rank_and_world()
        mine = len(range(rank, len(self.val), world))
        return Loader(
            lambda: self.val.batches(self.val_batch_size, rank, world, self.num_workers),
            -(-mine // self.val_batch_size),
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The cursor stays on the CPU: `consumed` reads it, and from a GPU that would wait for the step to end."""
        moved = super().transfer_batch_to_device({**batch, "cursor": None}, device, dataloader_idx)
        return Batch(**{**moved, "cursor": batch["cursor"]})

    def consumed(self, batch: Batch) -> None:
        """Note that a training step has used this batch."""
        for stream, turn, position in batch["cursor"].tolist():  # in order: a stream's last row stays
            self._cursors[stream] = (turn, position)
        self._dropped.update(batch["dropped"])
        self.samples_seen += len(batch["key"]) * self._rank_and_world()[1]
        self.batches_seen += 1

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as plain numbers and strings; the same on every rank.

        On several ranks all must call it together: each knows only its own streams.
        """
        parts: list[Progress] = [(self._cursors, self._dropped)]
        if distributed.is_available() and distributed.is_initialized():
            parts *= distributed.get_world_size()
            distributed.all_gather_object(parts, (self._cursors, self._dropped))
        cursors: dict[int, tuple[int, int]] = {}
        dropped = Counter(self._dropped_before)
        for theirs, drops in parts:
            dropped.update(drops)
            for stream, cursor in theirs.items():
                cursors[stream] = max(cursor, cursors.get(stream, cursor))  # a rank holds old ones of others' streams
        return {
            "samples_seen": self.samples_seen,
            "batches_seen": self.batches_seen,
            "cursors": {stream: list(cursors[stream]) for stream in sorted(cursors)},
            "dropped": dict(dropped),
            "data": self._order(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, on any number of ranks and workers.

        Raises:
            UserError: the state belongs to another order of samples: it says which setting differs.
        """
        for name, now in self._order().items():
            if (then := state_dict["data"][name]) != now:
                raise UserError(
                    f"the checkpoint was made with data.{name}={then}, this run has {now}: its position means nothing "
                    "here; use the same data settings or start a new run"
                )
        self.samples_seen = state_dict["samples_seen"]
        self.batches_seen = state_dict["batches_seen"]
        self._cursors = {stream: (turn, position) for stream, (turn, position) in state_dict["cursors"].items()}
        self._dropped_before = Counter(state_dict["dropped"])
        self._dropped = Counter()

    def _order(self) -> dict[str, Any]:
        """What the order of the samples depends on. Shards by their last two names: a data folder may move."""
        names = "\n".join("/".join(Path(path).parts[-2:]) for path in self.paths)
        return {
            "shards": f"{len(self.paths)} shards, digest {hashlib.sha256(names.encode()).hexdigest()[:12]}",
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_streams": min(self.max_streams, len(self.paths)),
        }

    def _train_batches(self) -> Iterator[Batch]:
        rank, world = self._rank_and_world()
        stream = SampleStream(
            self.paths,
            DecodeImage(self.side, self.random_flip, self.seed),
            self.seed,
            self.batch_size // self.accumulate,
            shuffle=self.shuffle,
            max_streams=self.max_streams,
            rank=rank,
            world=world,
            start=self.samples_seen,
            cursors=self._cursors,
        )
        return islice(batches(stream, self.num_workers), max(0, self.steps * self.accumulate - self.batches_seen))

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class Loader:
    """Makes a fresh iterator each time it is asked, and has a length, as Lightning needs it."""

    def __init__(self, make: Callable[[], Iterator[Batch]], length: int) -> None:
        self._make = make
        self._length = length

    def __iter__(self) -> Iterator[Batch]:
        return self._make()

    def __len__(self) -> int:
        return self._length
