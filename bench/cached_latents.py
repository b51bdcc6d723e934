"""Prints, as Markdown, how fast cached latents are read: webdataset's .decode(), our tar reader, our arrays; one core.

    taskset -c 0 python bench/cached_latents.py [ROUNDS]

Synthetic moments in the shape of Stable Diffusion's at 256 px, (1, 8, 32, 32) float16, with .txt and .json; all of it in the page
cache. A round reads every sample once, each reader in turn; the medians over the rounds are compared. (Their numpy arrays are
not yet tensors: `.decode()` leaves them so.)
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset

from ldm.data.accounts import Tally
from ldm.data.arrays import ArrayStream, LatentArrays, pack
from ldm.data.latents import CACHED, CacheShard, DecodeLatents, Stamp, to_npy
from ldm.data.sources import ShardCache
from ldm.data.stream import SampleStream, Source, batches, read_batches

SHARDS, EACH, BATCH = 4, 2048, 256
SHAPE = (1, 8, 32, 32)
CACHE = ShardCache("/nowhere", 1)  # all shards are local


def write(folder: Path) -> list[str]:
    """A latent cache of SHARDS * EACH samples, as `ldm shards encode` writes them."""
    stamp = Stamp(first_stage="0" * 64, side=256, moments=SHAPE, shards=SHARDS, source="", text=None)
    stamp.write(folder)
    random = np.random.default_rng(0)

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        caption = f"a photograph of the thing that has the number {number}"
        row = {"caption": caption, "key": f"{number:09d}", "status": "success", "error_message": None}
        row |= {"width": 256, "height": 256, "original_width": 640, "original_height": 480, "similarity": 0.31}
        row |= {"url": f"https://example.org/pictures/{number}.jpg", "aesthetic": 5.2}
        row |= {CACHED: {"original_size": [480, 640], "crop": [0, 43]}}
        moments = to_npy(random.standard_normal(SHAPE).astype(np.float16))
        return row["key"], {stamp.name(): moments, "txt": caption.encode(), "json": json.dumps(row).encode()}

    for shard in range(SHARDS):
        tally = Tally(1.0)
        tally.add(EACH, {}, {})
        CacheShard(folder, shard).write(map(sample, range(shard * EACH, (shard + 1) * EACH)), tally)
    return sorted(map(str, folder.glob("*.tar")))


def plain(paths: list[str]) -> Iterator[int]:
    """webdataset, sample by sample: what its .decode() itself costs."""
    for _ in webdataset.WebDataset(paths, shardshuffle=False).decode():
        yield 1


def batched(paths: list[str]) -> Iterator[int]:
    """webdataset, put together to batches: what a training step needs."""
    name = f"moments-{'0' * 12}.npy"
    data = webdataset.WebDataset(paths, shardshuffle=False).decode().to_tuple(name, "txt", "json", "__key__")
    for moments, *_ in data.batched(BATCH):
        yield len(moments)


def tars(paths: list[str], folder: Path) -> Iterator[int]:
    """Our reader: shuffled, checked, resumable, in batches."""
    decode = DecodeLatents(str(folder), 256)
    stream = SampleStream([Source(paths)], decode, seed=0, batch_size=BATCH, cache=CACHE)
    for batch in islice(batches(stream, 0), SHARDS * EACH // BATCH):
        yield len(batch["moments"])


def arrays(folder: Path) -> Iterator[int]:
    """Our arrays: shuffled over all rows, resumable, in batches."""
    rows = LatentArrays(folder)
    stream = ArrayStream(rows, len(rows), seed=0, batch_size=BATCH)
    for batch in read_batches(stream, 0, range(SHARDS * EACH // BATCH)):
        yield len(batch["moments"])


def microseconds(read: Callable[[], Iterator[int]]) -> float:
    """Of one sample."""
    start = time.perf_counter()
    count = sum(read())
    assert count == SHARDS * EACH
    return (time.perf_counter() - start) / count * 1e6


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        cache, packed = Path(temporary) / "cache", Path(temporary) / "arrays"
        cache.mkdir()
        paths = write(cache)
        pack(cache, packed, CACHE)
        readers = {
            "webdataset `.decode()`": lambda: plain(paths),
            "webdataset `.decode().to_tuple().batched()`": lambda: batched(paths),
            "ours, tars": lambda: tars(paths, cache),
            "ours, arrays": lambda: arrays(packed),
        }
        times: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(rounds):
            for name, read in readers.items():
                times[name].append(microseconds(read))
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["webdataset `.decode()`"]
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__}, ", end="")
    print(f"webdataset {version('webdataset')}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {cpu()}")
    print(f"{SHARDS} shards of {EACH}, batches of {BATCH}, {rounds} rounds\n")
    print("| reader | µs a sample, median | lowest | samples/s | against plain |\n|---|---|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.1f} | {min(times[name]):.1f} | {1e6 / value:,.0f} | {base / value:.2f}x |")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU unknown")


if __name__ == "__main__":
    main()
