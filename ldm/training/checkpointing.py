"""Checkpoints: complete or invisible, plain data only, the newest one found by name."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.errors import UserError

_NAME = re.compile(r"step_(\d{8})\.ckpt")


def newest(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step in run_dir/checkpoints, or None."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*.ckpt") if _NAME.fullmatch(p.name)]
    return max(found, default=None, key=lambda p: p.name)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's plain data on the CPU; never unpickles code.

    Raises:
        UserError: the file cannot be read as one.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"cannot read the checkpoint {path} ({type(error).__name__}); delete it to use the one before"
        ) from error


class Checkpoint(Callback):
    """Writes run_dir/checkpoints/step_<n>.ckpt every `every` optimizer steps and at the end, and keeps the last `keep`.

    A file is written aside, flushed to disk and renamed, so that a kill at any moment leaves the one before it whole.
    """

    def __init__(self, run_dir: str, every: int, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"callbacks.checkpoint: every={every}, keep={keep}; both must be at least 1")
        self.folder, self.every, self.keep = Path(run_dir) / "checkpoints", every, keep
        self.step = 0  # of the last checkpoint: with accumulation, several batches share a step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 and step not in (self.step, trainer.max_steps):  # the last one waits for validation
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)  # also after the last validation, whose latent statistics belong in it

    def save(self, trainer: Trainer) -> None:
        self.step = trainer.global_step
        path = self.folder / f"step_{self.step:08d}.ckpt"
        aside = path.with_suffix(".partial")
        trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            aside.rename(path)
            for old in sorted(self.folder.glob("step_*.ckpt"))[: -self.keep]:
                old.unlink()
