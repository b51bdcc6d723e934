"""LightningDataModules whose position in the data is what the training steps have consumed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from torch import distributed

from ldm.batch import Batch
from ldm.data.accounts import KeyLog, Tally
from ldm.data.decode import DecodeSample
from ldm.data.latents import Stamp
from ldm.data.sources import ShardCache, expand
from ldm.data.stream import OrderedSamples, SampleStream, Source, batches, count_streams
from ldm.errors import UserError

Shards = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(pl.LightningDataModule):
    """What data modules share: the position, the account of drops, the key log, the loaders.

    A subclass gives `val`, `stamp`, `_order` and `_read`. Call `consumed(batch)` after every training step: that is the
    position which the checkpoint holds.

    Args:
        side: pixels of the pictures that the batches stand for.
        batch_size: samples of one optimizer step, over all ranks and accumulation steps.
        steps: optimizer steps of the whole run. The training loader is that long: Lightning loses a batch at every
            resume of a loader without a length.
        seed: of the order.
        val_batch_size: of one rank.
        run_dir: where the key log goes.
        val_samples: at most so many samples are validated on; None: all.
        accumulate: micro-batches of one optimizer step.
        num_workers: reading processes of one rank; they change nothing but the speed.
        budget: share of samples that may be unusable before the run stops.
        log_keys: write run_dir/keys/rank<r>.jsonl, the keys of each step.
        cache: brings remote shards here.

    Raises:
        UserError: a number out of range (here), ranks that cannot share a batch (in `setup`), too many bad samples (in
            `consumed`).
    """

    side: int
    batch_size: int
    steps: int
    seed: int
    val_batch_size: int
    run_dir: str
    val_samples: int | None = None
    accumulate: int = 1
    num_workers: int = 0
    budget: float = 0.01
    log_keys: bool = False
    cache: ShardCache = field(default_factory=ShardCache)

    def __post_init__(self) -> None:
        super().__init__()
        self._at_least_one("side", "batch_size", "steps", "val_batch_size", "val_samples", "accumulate")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers}; expected 0 (read in the training process) or more")
        self.samples_seen = 0  # over all ranks
        self.batches_seen = 0  # micro-batches of each rank
        self._cursors: dict[int, tuple[int, int]] = {}  # of this rank's streams; after a load, of all
        self._tally = Tally(self.budget)  # of this rank since the load
        self._before = Tally(self.budget)  # of all ranks before it
        self._key_log: KeyLog | None = None
        self._step_keys: list[str] = []

    def setup(self, stage: str) -> None:
        """Find what is wrong with the data before the first step."""
        _, world = self._rank_and_world()
        share = world * self.accumulate
        if stage == "fit" and self.batch_size % share:
            raise UserError(
                f"data.batch_size={self.batch_size} cannot be split over {world} ranks x {self.accumulate} accumulation steps; "
                f"use a multiple of {share}"
            )
        if stage == "fit" and len(self.val) < world:
            raise UserError(
                f"{len(self.val)} validation samples leave some of {world} ranks without; give more by data.val_shards, "
                "data.val_samples"
            )

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
        self.samples_seen += len(batch["key"]) * self._rank_and_world()[1]
        self.batches_seen += 1
        self._step_keys += batch["key"]
        if self.batches_seen % self.accumulate == 0:
            if self._key_log is not None:
                self._key_log.write(self.batches_seen // self.accumulate, self._step_keys)
            self._step_keys = []
        self._tally.add(len(batch["key"]), batch["dropped"], batch["dropped_where"])
        if batch["dropped"]:
            (self._before + self._tally).check()

    def tally(self) -> Tally:
        """What all ranks have delivered and dropped since the run began. On several ranks all must call it together."""
        return sum((part for _, part in self._gathered()), self._before)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as plain numbers and strings; the same on every rank.

        On several ranks all must call it together: each knows only its own streams.
        """
        parts = self._gathered()
        cursors: dict[int, tuple[int, int]] = {}
        for theirs, _ in parts:
            for stream, cursor in theirs.items():
                cursors[stream] = max(cursor, cursors.get(stream, cursor))  # a rank holds old ones of others' streams
        return {
            "samples_seen": self.samples_seen,
            "batches_seen": self.batches_seen,
            "cursors": {stream: list(cursors[stream]) for stream in sorted(cursors)},
            "report": sum((part for _, part in parts), self._before).report(),
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
        self._before = Tally.from_report(state_dict["report"], self._tally.budget)
        self._tally = Tally(self._tally.budget)

    def _gathered(self) -> list[tuple[dict[int, tuple[int, int]], Tally]]:
        """Every rank's cursors and tally since the load."""
        mine = (self._cursors, self._tally)
        if not (distributed.is_available() and distributed.is_initialized()):
            return [mine]
        parts = [mine] * distributed.get_world_size()
        distributed.all_gather_object(parts, mine)
        return parts

    @property
    def val(self) -> "Ordered":
        """The validation samples."""
        raise NotImplementedError

    @property
    def stamp(self) -> Stamp | None:
        """Of the latent cache that is read; None: pictures are."""
        raise NotImplementedError

    def _order(self) -> dict[str, Any]:
        """What the order of the samples depends on."""
        raise NotImplementedError

    def _read(self, rank: int, world: int) -> Iterator[Batch]:
        """This rank's micro-batches from `samples_seen` on, endless."""
        raise NotImplementedError

    def _train_batches(self) -> Iterator[Batch]:
        rank, world = self._rank_and_world()
        if self.log_keys:  # not in setup: Lightning loads the position after it
            self._key_log = KeyLog(Path(self.run_dir, "keys"), rank, world, self.batches_seen // self.accumulate)
        return islice(self._read(rank, world), max(0, self.steps * self.accumulate - self.batches_seen))

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"data.{name}={value}; expected 1 or more")

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


@dataclass(eq=False, repr=False)
class ShardDataModule(DataModule):
    """Training: an endless, shuffled, resumable stream (see stream.py). Validation: the first samples, in order, once.

    Args:
        shards: paths or URLs with brace ranges, such as data/{00000..00012}.tar, a list of them, a file with one a line
            (list.txt), or several sources: {name: {shards: ..., weight: ...}}.
        val_shards: likewise; None: the last of `shards` is held out from training for validation.
        decode: what a sample becomes.
        shuffle: samples permuted together within a shard; 1: none.
        max_streams: shards read at the same time, over all ranks.
        allow_pipe: take `pipe:COMMAND` as a shard, which runs COMMAND in a shell.
        how_to_make: the command that makes the shards, told when one is missing.
        others: see DataModule.

    Raises:
        UserError: a number out of range (here), a missing shard, ranks and workers that cannot share the work (in `setup`).
    """

    shards: Shards
    val_shards: str | Sequence[str] | None
    decode: DecodeSample
    shuffle: int = 1024
    max_streams: int = 64
    allow_pipe: bool = False
    how_to_make: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("shuffle", "max_streams")

    @property
    def stamp(self) -> Stamp | None:
        """Of the latent cache that `decode` reads."""
        return getattr(self.decode, "stamp", None)

    @cached_property
    def sources(self) -> list[Source]:
        """The training shards."""
        if isinstance(self.shards, Mapping):
            _ = self.val_paths  # refuses sources without validation shards of their own
            return [self._source(name, source) for name, source in self.shards.items()]
        paths = self._expand(self.shards)
        if self.val_shards is None and len(paths) < 2:
            raise UserError(
                f"data.shards={self.shards!r} is one shard; give one more to hold out, or data.val_shards=..."
            )
        return [Source(paths if self.val_shards is not None else paths[:-1])]

    @cached_property
    def val_paths(self) -> list[str]:
        """The validation shards."""
        if self.val_shards is not None:
            return self._expand(self.val_shards)
        if isinstance(self.shards, Mapping):
            raise UserError("data.shards names several sources; give data.val_shards=... as well")
        return self._expand(self.shards)[-1:]

    @cached_property
    def val(self) -> OrderedSamples:
        """The validation samples."""
        return OrderedSamples(self.val_paths, self.decode.without_augmentation(), self.cache, self.val_samples)

    def setup(self, stage: str) -> None:
        """Find what is wrong with the data before the first step."""
        if stage == "fit":
            _, world = self._rank_and_world()
            shards = min(len(source.paths) for source in self.sources)
            slots = count_streams(shards, self.max_streams, world)
            if slots < world * self.num_workers:
                raise UserError(
                    f"{shards} shards and max_streams={self.max_streams} make {slots} streams, too few for {world} ranks "
                    f"x {self.num_workers} workers; set data.num_workers={slots // world} or less, or cut the data into "
                    "more shards"
                )
        super().setup(stage)

    def _order(self) -> dict[str, Any]:
        """What the order of the samples depends on. Shards by their last two names: a data folder may move."""
        names = [["/".join(Path(path).parts[-2:]) for path in source.paths] for source in self.sources]
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
        return {
            "shards": f"{sum(map(len, names))} shards, digest {digest}",
            "weights": [float(source.weight) for source in self.sources],
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_streams": min(self.max_streams, *map(len, names)),
        }

    def _expand(self, spec: str | Sequence[str]) -> list[str]:
        return expand(spec, self.how_to_make, self.allow_pipe)

    def _source(self, name: str, source: Mapping[str, Any]) -> Source:
        if set(source) != {"shards", "weight"} or not source["weight"] > 0:
            raise UserError(f"data.shards.{name}={dict(source)}; give shards: and weight:, a number above 0")
        return Source(self._expand(source["shards"]), source["weight"])

    def _read(self, rank: int, world: int) -> Iterator[Batch]:
        stream = SampleStream(
            self.sources,
            self.decode,
            self.seed,
            self.batch_size // self.accumulate,
            self.cache,
            shuffle=self.shuffle,
            max_streams=self.max_streams,
            rank=rank,
            world=world,
            start=self.samples_seen,
            cursors=self._cursors,
        )
        return batches(stream, self.num_workers)


class Ordered(Protocol):
    """Validation samples: in order, once."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, rank: int = 0, world: int = 1, num_workers: int = 0) -> Iterator[Batch]:
        """Rank r's samples r, r + world, ..., without padding."""


class Loader:
    """Makes a fresh iterator each time it is asked, and has a length, as Lightning needs it."""

    def __init__(self, make: Callable[[], Iterator[Batch]], length: int) -> None:
        self._make = make
        self._length = length

    def __iter__(self) -> Iterator[Batch]:
        return self._make()

    def __len__(self) -> int:
        return self._length
