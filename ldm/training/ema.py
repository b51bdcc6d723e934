"""Exponential moving averages of everything that is trained, in fp32 whatever the training's precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn

from ldm.errors import UserError
from ldm.training.strategies import joined, local, part


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that require grad, sharded ones as they are."""
    return {name: p.data for name, p in module.named_parameters() if p.requires_grad}


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The same parameters' own storage; of sharded ones this rank's part."""
    return {name: local(value) for name, value in trained(module).items()}


def whole(module: nn.Module, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's average as that of the whole model. All ranks call it together; of a sharded one, the first alone keeps it:
    each other's copy would lie in the same host's memory."""
    parameters, first = trained(module), not distributed.is_initialized() or distributed.get_rank() == 0
    gathered = ((name, value, joined(value, parameters[name])) for name, value in average.items())
    return {name: full for name, mine, full in gathered if first or full is mine}


def cut(module: nn.Module, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: this rank's part of it."""
    parameters = trained(module)
    return {name: local(part(value, parameters.get(name, value))) for name, value in average.items()}


@contextmanager
def swapped(module: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """The average's values inside the block, the module's own after it."""
    storage = trainable(module)
    own = {name: value.clone() for name, value in storage.items()}
    load(module, average)
    try:
        yield
    finally:
        for name, value in own.items():
            storage[name].copy_(value)


def load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies weights into the trained parameters, which must have just these names."""
    parameters = trainable(module)
    if parameters.keys() != weights.keys():
        differ = sorted(parameters.keys() ^ weights.keys())
        raise UserError(
            f"the averaged weights do not fit the model: {len(differ)} names differ, the first is {differ[0]}"
        )
    for name, value in weights.items():
        parameters[name].copy_(value)


class Average(Callback):
    """What averages share: they follow each optimizer step, also where a checkpoint is written before their turn.

    A subclass gives `_update(current)`.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.step = -1  # Lightning's step at the last update: with accumulation, several batches make one
        self.current: dict[str, Tensor] = {}  # the parameters' own storage

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        self.current = trainable(pl_module)  # found once: walking the modules costs as much as the average itself

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self.step and self.current:
            self.step = trainer.global_step
            self._update([value.float() for value in self.current.values()])
            self.updates += 1

    def _begun(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's average on the device; without one, the weights that training starts from."""
        source = weights or self.current
        return {k: source[k].to(v.device, torch.float32, copy=True) for k, v in self.current.items()}

    def _update(self, current: list[Tensor]) -> None:
        raise NotImplementedError


class EMA(Average):
    """The classical average; validation and sample grids see it.

    Args:
        decay: in [0, 1). The first steps use min(decay, (1 + n) / (10 + n)), Stable Diffusion's warm-up.

    In a checkpoint: `ema` = {"updates": n, "weights": {name: fp32 tensor}}, apart from the raw weights.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay is {decay}; give a number in [0, 1)")
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.weights = self._begun(self.weights)

    def _update(self, current: list[Tensor]) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap = swapped(pl_module, self.weights or trainable(pl_module))
        self._swap.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.__exit__(None, None, None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.on_train_batch_end(trainer, pl_module)
        checkpoint["ema"] = {"updates": self.updates, "weights": whole(pl_module, self.weights)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "ema" not in checkpoint:
            raise UserError(
                "the checkpoint has no averaged weights, and callbacks.ema is set: an average cannot begin in the middle of a "
                "run; go on with callbacks.ema=null, or give another name="
            )
        saved = checkpoint["ema"]
        self.updates, self.weights = saved["updates"], cut(pl_module, saved["weights"])
