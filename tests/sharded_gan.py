"""Trains a tiny autoencoder against an adversary for three steps on `world` gloo ranks: what test_adversarial runs.

python tests/sharded_gan.py WORLD OUT
"""

import sys
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from tiny import autoencoder, batch, rows

from ldm.models.discriminator import PatchDiscriminator
from ldm.training.adversarial import Adversary, Hinge
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.optim import Warmup
from ldm.training.reconstruction_loss import ReconstructionLoss


class Sharded(AutoencoderModule):
    """Each rank takes its part of the global batch."""

    def training_step(self, batch: Any, i: int) -> torch.Tensor:
        world, n = self.trainer.world_size, len(batch["index"])
        mine = list(range(self.global_rank * n // world, (self.global_rank + 1) * n // world))
        return super().training_step(rows(batch, mine), i)

    def on_train_end(self) -> None:
        torch.save(self.state_dict(), f"{sys.argv[2]}.{self.global_rank}")


def main() -> None:
    world = int(sys.argv[1])
    torch.manual_seed(0)
    network = PatchDiscriminator(4, layers=1, batch_norm=False)
    l1 = partial(torch.nn.functional.l1_loss, reduction="none")
    module = Sharded(
        autoencoder(), ReconstructionLoss(l1, learn_logvar=True), 1e-6, partial(torch.optim.SGD, lr=0.05), Warmup(1),
        seed=0, adversary=Adversary(network, Hinge(), start=1),
    )  # fmt: skip
    parts = [batch(8, start=8 * i) for i in range(3)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(parts, batch_size=None))


if __name__ == "__main__":
    main()
