"""Generation for evaluation: a picture is a function of its caption, its index and the seed alone.

What is finished is kept, in shards of PNGs and captions, so that a stopped evaluation goes on and another one measures the
same pictures. Ranks share the shards out; nothing is padded.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed

from ldm.batch import to_uint8
from ldm.errors import UserError
from ldm.files import aside

Sample = Callable[[list[str], Tensor], Tensor]  # captions, index (B,) -> images (B, 3, H, W) in [-1, 1]
SHARD = 16  # pictures of a shard; a stop loses these or a batch


class Ranks(NamedTuple):
    """Which of how many processes this is, and which of those on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> "Ranks":
        """By torchrun's variables; else by SLURM's, in a job step of srun."""
        env = os.environ
        if "RANK" in env:
            return cls(int(env["RANK"]), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))
        if "SLURM_STEP_ID" not in env:  # a batch script has the rest, and is one process
            return cls()
        # SLURM_NTASKS may be the allocation's, in the one shell that salloc opens in it
        world = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1
        return cls(int(env["SLURM_PROCID"]), int(world), int(env["SLURM_LOCALID"]))

    def device(self) -> torch.device:
        """A GPU of its own. SLURM may show each process that one alone: hence the modulo."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local % torch.cuda.device_count())

    def meet(self) -> None:
        """Joins the process group, through which metrics gather.

        Raises:
            UserError: it is not said where.
        """
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise UserError(
                f"rank {self.rank} of {self.world} cannot find the others without {' and '.join(missing)}: start them by "
                "torchrun or slurm/evaluate.sbatch, which set both; or a single one, srun --ntasks=1"
            )
        # a day, not half an hour: a rank that is done waits for the slowest, which may have hours more to make, for instance
        # where another number of ranks goes on with what was stopped
        distributed.init_process_group("gloo", rank=self.rank, world_size=self.world, timeout=timedelta(days=1))

    def share(self, n: int) -> range:
        """This rank's of n things: consecutive, so that the ranks' results joined in order are in order.

        Raises:
            UserError: a rank would have none.
        """
        if n < self.world:
            raise UserError(
                f"{n} shards of {SHARD} pictures are too few for {self.world} ranks; use fewer, or a larger n"
            )
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)


SINGLE = Ranks()


def shards(n: int) -> int:
    return -(-n // SHARD)


def rows_of(shard: int, n: int) -> slice:
    return slice(shard * SHARD, min((shard + 1) * SHARD, n))


def in_bfloat16(sample: Sample, device: str) -> Sample:
    """The same with its matrix products and convolutions in bfloat16, as trainer.precision=bf16-mixed trains.

    device: "cuda", "cpu": its type.
    """

    def cast(captions: list[str], index: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return sample(captions, index)

    return cast


def generate(
    sample: Sample, captions: Sequence[str], batch_size: int, folder: Path, ranks: Ranks = SINGLE
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (which captions, their pictures (B, 3, H, W) uint8 on the CPU), in order: this rank's share.

    Args:
        batch_size: pictures made together.
        folder: where the shards are kept, 00000.tar ...; those that are there are read, not made again.

    Raises:
        UserError: there are no captions, or pictures that are not finite.
    """
    if not captions:
        raise UserError("there are no captions to generate for: the list is empty")
    folder.mkdir(parents=True, exist_ok=True)
    todo: list[int] = []  # missing shards in a row, as many as make a batch
    for shard in ranks.share(shards(len(captions))):
        path = folder / f"{shard:05d}.tar"
        if not path.exists():
            todo.append(shard)
            if len(todo) * SHARD >= batch_size:
                yield from _made(sample, captions, batch_size, folder, todo)
                todo = []
            continue
        yield from _made(sample, captions, batch_size, folder, todo)
        todo = []
        rows, images = rows_of(shard, len(captions)), _read(path)
        assert len(images) == rows.stop - rows.start, f"{path} holds {len(images)} pictures"
        yield rows, images
    yield from _made(sample, captions, batch_size, folder, todo)


def stamp(folder: Path, weights: str) -> None:
    """Notes whose weights made a folder's pictures. Raises UserError when they were others': they would mix."""
    path = folder / "made_by.json"
    if path.exists() and (before := json.loads(path.read_text())["weights"]) != weights:
        raise UserError(
            f"the pictures in {folder} are those of weights {before}, the run now has {weights}: delete {folder.parent}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial:
        partial.write_text(json.dumps({"weights": weights}) + "\n")


def _made(
    sample: Sample, captions: Sequence[str], batch_size: int, folder: Path, todo: Sequence[int]
) -> Iterator[tuple[slice, Tensor]]:
    """The pictures of shards in a row, made in batches and written."""
    if not todo:
        return
    first, end = todo[0] * SHARD, rows_of(todo[-1], len(captions)).stop
    parts = [slice(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]
    batches = [_make(sample, captions, rows) for rows in parts]
    images = torch.cat(batches)
    for shard in todo:
        rows = rows_of(shard, len(captions))
        _write(folder / f"{shard:05d}.tar", images[rows.start - first : rows.stop - first], captions[rows], rows.start)
    yield from zip(parts, batches, strict=True)


def _make(sample: Sample, captions: Sequence[str], rows: slice) -> Tensor:
    images = sample(list(captions[rows]), torch.arange(rows.start, rows.stop))
    if not torch.isfinite(images).all():
        raise UserError(f"the pictures of captions {rows.start} to {rows.stop - 1} are not finite (NaN or infinite)")
    return to_uint8(images).cpu()


def _write(path: Path, images: Tensor, captions: Sequence[str], first: int) -> None:
    """A shard that exists is whole."""
    # pool: one core would take a tenth of a GPU's time
    with aside(path) as partial, tarfile.open(partial, "w") as tar, ThreadPoolExecutor() as pool:
        for i, (png, caption) in enumerate(zip(pool.map(_png, images), captions, strict=True), first):
            for ending, data in (("png", png), ("txt", caption.encode())):
                header = tarfile.TarInfo(f"{i:09d}.{ending}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


class Kept(NamedTuple):
    """One of the pictures that `generate` keeps."""

    index: int  # type: ignore[assignment]  # in place of tuple's
    png: bytes
    caption: str


def kept(folder: Path, indices: Iterable[int]) -> list[Kept]:
    """Those of these pictures that are in the folder, in this order."""
    out = []
    for i in indices:
        path = folder / f"{i // SHARD:05d}.tar"
        if path.exists():
            with tarfile.open(path) as tar:
                files = {member.name: _bytes(tar, member) for member in tar if member.name.startswith(f"{i:09d}.")}
                if files:
                    out.append(Kept(i, files[f"{i:09d}.png"], files[f"{i:09d}.txt"].decode()))
    return out


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular one
    return file.read()


def _read(path: Path) -> Tensor:
    with tarfile.open(path) as tar:
        files = [_bytes(tar, member) for member in tar if member.name.endswith(".png")]
    pictures = [np.array(Image.open(io.BytesIO(data), formats=("PNG",))) for data in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
