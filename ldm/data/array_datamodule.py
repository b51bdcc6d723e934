"""The arrays of a latent cache as a LightningDataModule."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

from ldm.batch import Batch
from ldm.data.arrays import ArrayStream, LatentArrays, OrderedRows
from ldm.data.datamodule import DataModule, Ordered
from ldm.data.latents import DecodeLatents, Stamp, fit_for
from ldm.data.sources import expand
from ldm.data.stream import OrderedSamples, read_batches
from ldm.errors import UserError


@dataclass(eq=False, repr=False)
class ArrayDataModule(DataModule):
    """Training: all rows, each epoch in another order, endless and resumable (see arrays.py). Validation: shards, or the last
    rows.

    Args:
        folder: of the arrays, made by `ldm shards pack`.
        val_shards: shards of pictures or of latents; None: the last `val_samples` rows are held out from training.
        random_flip: mirror half of the samples; the cache must hold them mirrored.
        others: see DataModule.

    Raises:
        UserError: arrays that are not there or cannot give what is asked (here), too few rows (in `setup`).
    """

    folder: str
    val_shards: str | list[str] | None
    val_samples: int = field(kw_only=True)
    random_flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arrays = LatentArrays(self.folder)
        fit_for(self.stamp, self.folder, self.side, self.random_flip)

    @property
    def stamp(self) -> Stamp:
        """Of the latent cache."""
        return self.arrays.stamp

    @cached_property
    def rows(self) -> int:
        """How many are trained on: the first ones."""
        rows = len(self.arrays) - (0 if self.val_shards else self.val_samples)
        if rows < 1:
            raise UserError(
                f"data.folder={self.folder} has {len(self.arrays)} rows, all held out by data.val_samples={self.val_samples}; "
                "give a smaller number, or data.val_shards=..."
            )
        return rows

    @cached_property
    def val(self) -> Ordered:
        """The validation samples."""
        if not self.val_shards:
            return OrderedRows(self.arrays, self.rows)
        decode = DecodeLatents(self.folder, self.side).without_augmentation()
        return OrderedSamples(expand(self.val_shards), decode, self.cache, self.val_samples)

    def _order(self) -> dict[str, Any]:
        """What the order of the samples depends on."""
        digest = hashlib.sha256(json.dumps(asdict(self.stamp)).encode()).hexdigest()[:12]
        return {"folder": f"{self.rows} rows of cache {digest}", "seed": self.seed}

    def _read(self, rank: int, world: int) -> Iterator[Batch]:
        stream = ArrayStream(
            self.arrays,
            self.rows,
            self.seed,
            self.batch_size // self.accumulate,
            random_flip=self.random_flip,
            rank=rank,
            world=world,
            start=self.samples_seen,
        )
        return read_batches(stream, self.num_workers, count())
