"""The exponential moving average of everything that is trained, in fp32 whatever the training's precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ldm.errors import UserError


def trainable(module: LightningModule) -> dict[str, Tensor]:
    return {name: p.data for name, p in module.named_parameters() if p.requires_grad}


@contextmanager
def swapped(module: LightningModule, average: dict[str, Tensor]) -> Iterator[None]:
    """The average's values inside the block, the module's own after it."""
    own = {name: value.clone() for name, value in trainable(module).items()}
    load(module, average)
    try:
        yield
    finally:
        load(module, own)


def load(module: LightningModule, weights: dict[str, Tensor]) -> None:
    """Copies weights into the trained parameters, which must have just these names."""
    parameters = trainable(module)
    if parameters.keys() != weights.keys():
        differ = sorted(parameters.keys() ^ weights.keys())
        raise UserError(
            f"the averaged weights do not fit the model: {len(differ)} names differ, the first is {differ[0]}"
        )
    for name, value in weights.items():
        parameters[name].copy_(value)


class EMA(Callback):
    """Averages after each optimizer step; validation and sample grids see the average.

    Args:
        decay: in [0, 1). The first steps use min(decay, (1 + n) / (10 + n)), Stable Diffusion's warm-up.

    In a checkpoint: `ema` = {"updates": n, "weights": {name: fp32 tensor}}, apart from the raw weights.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay is {decay}; give a number in [0, 1)")
        self.decay, self.updates = decay, 0
        self.step = -1  # Lightning's step at the last update: with accumulation, several batches make one
        self.weights: dict[str, Tensor] = {}
        self.current: dict[str, Tensor] = {}  # the parameters' own storage

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        source = self.weights or trainable(pl_module)
        self.current = trainable(pl_module)  # found once: walking the modules costs as much as the average itself
        self.weights = {k: source[k].to(v.device, torch.float32, copy=True) for k, v in self.current.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [value.float() for value in self.current.values()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)
        self.updates += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap = swapped(pl_module, self.weights or trainable(pl_module))
        self._swap.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.__exit__(None, None, None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = {"updates": self.updates, "weights": self.weights}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.updates, self.weights = checkpoint["ema"]["updates"], checkpoint["ema"]["weights"]
