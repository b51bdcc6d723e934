"""Levers on speed that change no mathematics."""

import torch
import torch._functorch.config as functorch
from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.errors import UserError
from ldm.training.strategies import FullySharded


class Levers(Callback):
    """Compiles the networks that cost the time, and lays them out, before training. Names in checkpoints stay as they are.

    Others are plain config: trainer.precision=bf16-mixed, model.optimizer.fused, model.backbone.checkpointing, data=latents.

    Args:
        networks: their names in the module, such as denoiser.backbone.
        compile: torch.compile's backend, such as inductor; None: not compiled.
        channels_last: the order of convolutions' weights that tensor cores read fastest (U-Nets, autoencoders).

    Raises:
        UserError: a name that the module does not have, or channels_last under FSDP (in `setup`).
    """

    def __init__(self, networks: list[str], compile: str | None = None, channels_last: bool = False) -> None:  # noqa: A002
        self.networks, self.compile, self.channels_last = networks, compile, channels_last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        there = dict(pl_module.named_modules())
        for name in self.networks:
            if name not in there:
                raise UserError(f"callbacks.levers.networks: {name} is no network of a {type(pl_module).__name__}")
            if self.channels_last and isinstance(trainer.strategy, FullySharded):
                raise UserError(
                    "callbacks.levers.channels_last=true: FSDP cuts plain weights only; use trainer=ddp, or false"
                )
            if self.channels_last:
                there[name].to(memory_format=torch.channels_last)
            if self.compile is not None:
                functorch.donated_buffer = False  # an adversary goes through the decoder's graph twice
                there[name].compile(backend=self.compile)
