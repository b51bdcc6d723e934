"""Numerical faults: a step whose loss or gradient is not finite on any rank moves nothing on all of them."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from ldm.batch import Batch
from ldm.diffusion.loss import DenoisingLoss
from ldm.errors import UserError
from ldm.files import cut_after
from ldm.keyed_random import KeyedRandom
from ldm.training.base import TrainingModule
from ldm.training.ema import Average
from ldm.training.session import say
from ldm.training.strategies import local


class Faults(Callback):
    """Leaves a step out, weights, optimizer and averages alike, when a loss or the gradient's norm is not finite on any
    rank; the step counts, for the data were used. Each rank writes what its part was made of to
    run_dir/nonfinite/rank<r>.jsonl, and `train/nonfinite` is how many there were.

    The cost of a step: the norm, which clipping uses again, one all-reduce of one number, and one wait for the device, which
    reads it. Stands before the averages. With the first step it names the trained parameters that get no gradient.

    Args:
        run_dir: the run's directory.
        limit: so many in a row end the run.

    Raises:
        UserError: `limit` is below 1, or was reached.
    """

    def __init__(self, run_dir: str, limit: int = 10) -> None:
        if limit < 1:
            raise UserError(
                f"callbacks.faults.limit={limit}; give the number of faulty steps in a row that end the run"
            )
        self.folder, self.limit = Path(run_dir) / "nonfinite", limit
        self.total = self.in_a_row = 0
        self.skipped = self.searched = False
        self.losses: list[Tensor] = []  # of the step's micro-batches
        self.batches: list[Batch] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file = self.folder / f"rank{trainer.global_rank}.jsonl"
        cut_after(self.file, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.skipped, self.losses, self.batches = False, [], []
        self.batches.append(Batch(key=batch["key"], index=batch["index"]))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.losses.append(loss.detach().float())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: TrainingModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.searched:
            _name_unused(pl_module)
            self.searched = True
        norms = pl_module.gradient_norms()
        fault = (~torch.stack([*self.losses, *norms]).isfinite().all()).int()
        if trainer.world_size > 1:
            distributed.all_reduce(fault, distributed.ReduceOp.MAX)
        self.skipped = bool(fault)
        self.in_a_row = self.in_a_row + 1 if self.skipped else 0
        if self.skipped:
            self.total += 1
            self._write(trainer.global_step + 1, pl_module, torch.stack(norms).norm())
            optimizer.zero_grad()  # no gradient at all: every optimizer passes over such parameters

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.skipped:
            for callback in trainer.callbacks:
                if isinstance(callback, Average):
                    callback.step = trainer.global_step  # it has seen this step: there is nothing new to average
            what = f"step {trainer.global_step}: a loss or gradient is not finite"
            if self.in_a_row >= self.limit:
                raise UserError(
                    f"{what}, {self.in_a_row} times in a row; their samples are in {self.folder}; lower "
                    "model.optimizer.lr, or look at those samples"
                )
            say(f"{what}; no weight moved ({self.total} such steps so far, see {self.folder})")
        if self.total:
            pl_module.log("train/nonfinite", float(self.total))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["faults"] = {"total": self.total, "in_a_row": self.in_a_row}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("faults", {"total": 0, "in_a_row": 0})  # format 1 had none
        self.total, self.in_a_row = saved["total"], saved["in_a_row"]

    def _write(self, step: int, module: LightningModule, norm: Tensor) -> None:
        """Losses and norm as strings: JSON has neither NaN nor infinity."""
        index = torch.cat([batch["index"] for batch in self.batches])
        wrong = [n for n, p in module.named_parameters() if p.grad is not None and not local(p.grad).isfinite().all()]
        row: dict[str, Any] = {
            "step": step,
            "loss": [f"{loss.item():g}" for loss in self.losses],
            "gradient_norm": f"{norm.item():g}",
            "parameters": wrong[:10],
            "keys": [key for batch in self.batches for key in batch["key"]],
            "index": index.tolist(),
        }
        loss = getattr(module, "loss", None)
        if isinstance(loss, DenoisingLoss):  # drawn again: a function of seed and sample
            row["sigma"] = loss.schedule(loss.draw(KeyedRandom(module.seed, index))).tolist()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _name_unused(module: LightningModule) -> None:
    unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None and local(p).numel()]
    if unused:
        warnings.warn(
            f"{len(unused)} trained parameters get no gradient: {', '.join(unused[:5])}{' ...' * (len(unused) > 5)}; "
            "freeze them, or use them: DDP stops at its second step otherwise",
            stacklevel=2,
        )
