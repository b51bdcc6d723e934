"""Reading JPEG shards beside a plain webdataset + Pillow pipeline: rate, pixels, overhead, memory, cost of a resume.

    taskset -c 0 python bench/loading.py

Pictures of 1024 x 768, short side to 256, center crop; one core; both pipelines in turn, medians over rounds.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import webdataset
from PIL import Image

from ldm.data.datamodule import ShardDataModule
from ldm.data.decode import DecodeSample
from ldm.data.sources import ShardCache, expand
from ldm.data.stream import SampleStream, Source, batches
from ldm.data.writer import ShardWriter
from ldm.training import session
from ldm.training.callbacks import DataPosition

WIDTH, HEIGHT, SIDE, BATCH = 1024, 768, 256, 50
SHARDS, SHARD = 8, 100
ROUNDS = 5


def photo(seed: int) -> bytes:
    """A JPEG of a photograph's size in bytes: large smooth shapes, texture, a little noise."""
    rng = np.random.default_rng(seed)

    def layer(cells: int) -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // cells, WIDTH // cells, 3), dtype=np.uint8))
        return np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(int)

    pixels = layer(32) + (layer(6) - 128) // 4 + rng.integers(-4, 5, (HEIGHT, WIDTH, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def write(folder: Path) -> list[str]:
    pictures = [photo(seed) for seed in range(20)]
    with ShardWriter(folder, SHARD) as writer:
        for i in range(SHARDS * SHARD):
            writer.write(pictures[i % len(pictures)], "jpg", f"picture {i}")
    return expand(f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar")


def plain(paths: list[str]) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """What one writes in ten minutes."""

    def transform(image: Image.Image) -> torch.Tensor:
        scale = SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    dataset = webdataset.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")
    rows = iter(dataset)
    while chunk := list(islice(rows, BATCH)):
        yield torch.stack([transform(image) for image, _ in chunk]), [caption for _, caption in chunk]


def stream(paths: list[str], **options: object) -> SampleStream:
    decode = DecodeSample(SIDE, scaled_decode=options.pop("scaled_decode", None))
    return SampleStream([Source(paths)], decode, 0, BATCH, ShardCache("unused", 1), max_streams=4, **options)


def rate(make: Callable[[], Iterable], count: int = 8) -> float:
    """Samples a second over `count` batches, the first one apart."""
    rows = iter(make())
    next(rows)
    start = time.perf_counter()
    n = sum(1 for _ in islice(rows, count))
    return n * BATCH / (time.perf_counter() - start)


class OneNumber(pl.LightningModule):
    """An instant model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.times: list[float] = []

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def trained_rate(paths: list[str], folder: Path, steps: int = 10) -> float:
    """Samples a second through Lightning."""
    data = ShardDataModule(
        paths, paths[:1], DecodeSample(SIDE), side=SIDE, batch_size=BATCH, steps=steps, seed=0, val_batch_size=8,
        run_dir=folder, val_samples=1, max_streams=4,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[DataPosition(folder)],
    )  # fmt: skip
    model = OneNumber()
    trainer.fit(model, datamodule=data)
    return (steps - 1) * BATCH / (model.times[-1] - model.times[0])


def memory_slope(paths: list[str], samples: int = 10_000) -> float:
    """Growth of resident memory in MB per 1,000 samples: a line through the second half of the readings."""
    readings = []
    for i, _ in enumerate(islice(batches(stream(paths), 0), samples // BATCH)):
        readings.append((i * BATCH / 1000, int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6))
    half = readings[len(readings) // 2 :]
    return float(np.polyfit(*zip(*half, strict=True), 1)[0])


def resume_cost(paths: list[str]) -> float:
    """Bytes read for the first batch after a resume, over streams, in shards."""
    cursors = {}
    for batch in islice(batches(stream(paths), 0), 19):
        cursors |= {s: (turn, position) for s, turn, position in batch["cursor"].tolist()}
    before = bytes_read()
    next(batches(stream(paths, start=19 * BATCH, cursors=cursors), 0))
    shard = statistics.mean(Path(path).stat().st_size for path in paths)
    return (bytes_read() - before) / 4 / shard


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def main() -> None:
    torch.set_num_threads(1)
    session.quiet()
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder) / "shards")
        theirs = {
            caption: image
            for images, captions in plain(paths[:1])
            for image, caption in zip(images, captions, strict=True)
        }
        differences = []
        for batch in islice(batches(stream(paths[:1]), 0), 2):
            for image, caption in zip(batch["image"], batch["caption"], strict=True):
                differences.append((image.int() - theirs[caption].int()).abs().max().item())
        rounds = {
            "webdataset + Pillow": lambda: rate(lambda: plain(paths)),
            "ours": lambda: rate(lambda: batches(stream(paths), 0)),
            "ours, scaled_decode=1.5": lambda: rate(lambda: batches(stream(paths, scaled_decode=1.5), 0)),
            "ours through Lightning, an instant model": lambda: trained_rate(paths, Path(folder)),
        }
        rates: dict[str, list[float]] = {name: [] for name in rounds}
        for _ in range(ROUNDS):
            for name, measure in rounds.items():
                rates[name].append(measure())
        medians = {name: statistics.median(values) for name, values in rates.items()}
        size = statistics.mean(Path(path).stat().st_size for path in paths) / SHARD / 1000
        print(f"torch {torch.__version__}, webdataset {webdataset.__version__}, one core; {size:.0f} kB a picture\n")
        print("| pipeline | pictures/s | to webdataset + Pillow |\n|---|---|---|")
        for name, value in medians.items():
            print(f"| {name} | {value:.0f} | {value / medians['webdataset + Pillow']:.2f} |")
        kept = [a / b for a, b in zip(rates["ours through Lightning, an instant model"], rates["ours"], strict=True)]
        print(f"\n- largest difference of a pixel to Pillow's: {max(differences)} of 255, {len(differences)} pictures")
        print(f"- rate kept through Lightning: {statistics.median(kept):.3f}")
        print(f"- first batch after a resume: {resume_cost(paths):.2f} shards' bytes per stream")
        print(f"- resident memory over 10,000 samples: {memory_slope(paths):+.2f} MB per 1,000 samples")
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
