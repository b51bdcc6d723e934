"""Scores of a model under several protocols: generate, measure, write results.json and a grid, show one table."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from ldm.batch import Batch
from ldm.errors import UserError
from ldm.evaluation.generate import generate
from ldm.evaluation.grid import picture_grid
from ldm.evaluation.protocol import digest, protocol_id


@dataclass(frozen=True)
class Reference:
    """Held-out pictures and the captions to generate for. images: (N, 3, H, W) uint8."""

    images: Tensor
    captions: list[str]

    @classmethod
    def read(cls, batches: Iterable[Batch], n: int | None) -> "Reference":
        """Raises UserError when there is nothing to read, less than the n that were asked for, or latents only."""
        batches = list(batches)
        captions = [caption for batch in batches for caption in batch["caption"]]
        if len(captions) < (n or 1):
            raise UserError(f"n={n}, but the validation shards hold {len(captions)} usable samples; ask for fewer")
        if any("image" not in batch for batch in batches):
            raise UserError(
                "the validation data are a latent cache's, without pictures; give data.val_shards=... with pictures"
            )
        return cls(torch.cat([batch["image"] for batch in batches]), captions)

    def protocol(self) -> dict[str, Any]:
        return {
            "n": len(self.captions),
            "side": self.images.shape[-1],
            "captions": digest(caption.encode() for caption in self.captions),
            "reference": digest([self.images.numpy().tobytes()]),
        }


@dataclass(frozen=True)
class Round:
    """One way to make pictures. make: (captions, index (B,)) -> (B, 3, H, W) in [-1, 1]; protocol: how, as plain data."""

    label: str
    make: Callable[[list[str], Tensor], Tensor]
    protocol: dict[str, Any]


def score(
    round_: Round, reference: Reference, metrics: Sequence[Metric], batch_size: int
) -> tuple[dict[str, float], Tensor]:
    """The metrics' values by name, and the pictures (N, 3, H, W) uint8."""
    pictures = []
    total = -(-len(reference.captions) // batch_size)
    batches = generate(round_.make, reference.captions, batch_size)
    for rows, images in track(batches, f"{round_.label:>14}", total=total):
        for metric in metrics:
            metric.update(images, reference.captions[rows], reference.images[rows])
        pictures.append(images)
    values = {name: value for metric in metrics for name, value in metric.compute().items()}
    return values, torch.cat(pictures)


def evaluate(
    rounds: Sequence[Round],
    reference: Reference,
    metrics: Callable[[], list[Metric]],
    folder: Path,
    step: int,
    batch_size: int,
    pictures: int,
) -> dict[str, dict[str, float]]:
    """Scores each round; writes folder/<id>/results.json and grid.png, prints one table. Returns the metrics by label.

    metrics: makes fresh metrics for a round; step: of the checkpoint; pictures: how many the grid shows.
    """
    scores = {}
    for round_ in rounds:
        protocol = {**reference.protocol(), **round_.protocol}
        values, images = score(round_, reference, metrics(), batch_size)
        scores[round_.label] = values
        result = folder / f"step{step}-{round_.label.replace(' ', '')}-{protocol_id(protocol)}"
        result.mkdir(parents=True, exist_ok=True)
        content = {
            "protocol": {"id": protocol_id(protocol), **protocol},
            "checkpoint": {"step": step},
            "metrics": values,
        }
        (result / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        picture_grid(images[:pictures], reference.captions[:pictures], 8).save(result / "grid.png")
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 100)  # into a file it would be 80, and cut the names
    console.print(table(scores, f"{len(reference.captions)} captions, step {step}"))
    console.print(f"scores:  {result}/results.json\npicture: {result}/grid.png")
    return scores


def table(scores: dict[str, dict[str, float]], title: str) -> Table:
    """Metrics down, rounds across."""
    out = Table(title=title, box=SIMPLE_HEAD)
    out.add_column("metric", no_wrap=True)
    for label in scores:
        out.add_column(label.replace(" ", "\n"), justify="right")
    for name in next(iter(scores.values())):
        out.add_row(name, *(f"{values[name]:.3f}" for values in scores.values()))
    return out
