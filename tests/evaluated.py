"""Runs that were scored, for tests of pages: tiny pictures, made in milliseconds, and captions that nobody should trust."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from tiny import batch
from torch import Tensor
from torchmetrics import Metric

from ldm.evaluation.features import PooledPixels
from ldm.evaluation.measures import Jackknife, frechet
from ldm.evaluation.metrics import FeatureMetrics
from ldm.evaluation.scoring import Reference, Result, Round, evaluate

N, STEP = 20, 30
EVIL = "<script>console.error('run')</script><img src=https://example.com/x.png> & \"quotes\" {{ 7 * 7 }}"
CAPTIONS = [EVIL, *(f"caption {i}" for i in range(1, N))]
BEST = 2.0  # guidance of the lowest distance


class Nearness(Metric):
    """`caption_accuracy/all`: the share of gray levels within 40 of the reference's; picture by picture in `samples`."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("each", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, captions: Sequence[str], reference: Tensor) -> None:
        near = (images.int() - reference.int()).abs() < 40
        self.each.append(near.double().mean(dim=(1, 2, 3)))

    def compute(self) -> dict[str, float]:
        self.samples = {"caption_accuracy": torch.cat(self.each)}
        return {"caption_accuracy/all": float(torch.cat(self.each).mean()), "caption_accuracy/all/ci95": 0.05}


def sampled(scale: float, shift: float = 0.0, **changes: object) -> Round:
    """Pictures that are the more like the reference the nearer the scale is to BEST; the last ones are worse."""
    images = batch(N, side=8)["image"].float() / 127.5 - 1

    def make(captions: list[str], index: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))[index]
        return images[index] + noise * (abs(scale - BEST) * 0.4 + shift + 0.2) * (1 + index.view(-1, 1, 1, 1) / N)

    protocol = {"sampling": {"guidance": {"scale": scale}, "steps": 3}, "seed": 0, "weights": "ema"} | changes
    return Round(f"guidance {scale:g}", make, protocol, swept={"guidance": scale})


def scored(run: Path, rounds: Sequence[Round], n: int = N, **config: object) -> list[Result]:
    """A run directory with config.yaml, metrics.jsonl and results of these rounds."""
    run.mkdir(parents=True, exist_ok=True)
    saved = {"name": run.name, "run_dir": str(run), "model": {"_target_": "ldm.a.Module", "lr": 0.001}, **config}
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    lines = [{"step": s, "samples_seen": s * 8, "train/loss": 1 / s if s != 5 else None} for s in range(1, STEP + 1)]
    more = {"val/loss_level_0": 2.0, "train/loss_sigma/below": 1.0, "train/loss_sigma/0.3": 2.0, "val/accuracy/all": 0.5,
            "val/accuracy/color": 0.6}  # fmt: skip
    lines += [{"step": s, "samples_seen": s * 8, "val/loss": 1.2 / s, **more} for s in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    metrics = [FeatureMetrics(PooledPixels(1), [Jackknife(frechet)]), Nearness()]
    reference = Reference(batch(n)["image"], CAPTIONS[:n])
    return evaluate(rounds, reference, metrics, run / "evaluation", STEP, n, 4)
