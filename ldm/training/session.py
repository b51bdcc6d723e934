"""What a person sees at the beginning, at the end, and when something is out of the ordinary."""

import json
import logging
import math
import sys
import warnings
from pathlib import Path

from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console


def quiet() -> None:
    """Keeps Lightning's advice off the screen: the banner says what matters."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    advice = ("does not have many workers", "LeafSpec", "tensorboard", "Checkpoint directory", "in eval mode")
    # one rank needs no srun; what is logged without sync_dist is reduced already
    advice += ("The `srun` command is available", "It is recommended to use `self.log")
    for message in (*advice, "your dataloader is not resumable"):  # it resumes: see data/datamodule.py
        warnings.filterwarnings("ignore", f".*{message}")


@rank_zero_only
def say(text: str) -> None:
    """A line that a person should read, once for all ranks."""
    Console(highlight=False, soft_wrap=True).print(f"  {text}", markup=False)


def complain(text: str) -> None:
    """A line on stderr, from any rank."""
    print(f"error: {text}", file=sys.stderr, flush=True)


@rank_zero_only
def banner(
    name: str, run_dir: Path, module: LightningModule, data: LightningDataModule, trainer: Trainer, step: int
) -> None:
    """One line on what is trained, one on how long, one on where."""
    console = Console(highlight=False, soft_wrap=True)
    sizes = {flag: sum(p.numel() for p in module.parameters() if p.requires_grad == flag) for flag in (True, False)}
    frozen = f", {sizes[False] / 1e6:.2f}M frozen" if sizes[False] else ""
    console.print(f"[bold]{name}[/]: {type(module).__name__}, {sizes[True] / 1e6:.2f}M trainable parameters{frozen}")
    batch = f"global batch {data.batch_size} on {trainer.world_size} rank(s), {trainer.precision}"
    console.print(f"  {trainer.max_steps} steps, {trainer.max_steps * data.batch_size:,} samples; {batch}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            where = logger.experiment.url or f"offline in {run_dir}/wandb; `wandb sync` uploads it"
            console.print(f"  W&B: {where}")
    if step >= trainer.max_steps:
        console.print(f"  {run_dir} is complete at step {step}: nothing to do; raise trainer.max_steps to go on")
    else:
        console.print(f"  {run_dir}: {'starts at step 0' if step == 0 else f'continues from step {step}'}")


@rank_zero_only
def farewell(run_dir: Path, trainer: Trainer) -> None:
    """The last validation, and where its pictures are."""
    console = Console(highlight=False, soft_wrap=True)
    validated = [row for row in _rows(run_dir / "metrics.jsonl") if any(key.startswith("val/") for key in row)]
    if validated:
        values = ("loss", "psnr", "kl", "distance")
        last = {key: math.nan if value is None else value for key, value in validated[-1].items()}
        shown = [f"{k} {last[f'val/{k}']:.4g}" for k in values if f"val/{k}" in last]
        console.print(f"  validation at step {validated[-1]['step']}: {', '.join(shown)}")
    pictures = sorted((run_dir / "samples").glob("*.png"))
    if pictures:
        console.print(f"  pictures: {pictures[-1]}")


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
