"""Our training step beside diffusers' text-to-image recipe: one U-Net, one batch, cached latents and text; part by part.

    OMP_NUM_THREADS=2 python bench/train_step.py [--compile] [--v2] [--batch 4]

Theirs is what its example script does with --use_ema: DDPMScheduler, AdamW, clip_grad_norm_, EMAModel, all as they come.
Ours is LatentDiffusionModule.training_step with the default callbacks' work in it: the search for gradients that are not
finite (counted as clipping) and the average. Each takes a step in turn; memory is that of a process of its own.
"""

import argparse
from functools import partial
from types import SimpleNamespace

import measuring
import peers
import torch
from torch import Tensor, nn

from ldm.batch import Batch
from ldm.diffusion.loss import DenoisingLoss
from ldm.diffusion.parameterization import Eps
from ldm.diffusion.weighting import Classical
from ldm.models.conditioners import TextConditioner
from ldm.models.first_stage import FirstStage
from ldm.models.text import CachedText
from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.faults import Faults
from ldm.training.latent_diffusion import LatentDiffusionModule
from ldm.training.optim import Warmup

SIDES = "ours", "diffusers"
SIDE, LENGTH = 32, 77  # of the latents; of the text
AFTER = ("clip", "optimizer", "EMA")
GROUPS = {
    "forward": ["forward"],
    "backward": ["backward"],
    **{part: [part] for part in AFTER},
    "clip + optimizer + EMA": AFTER,
    "step": ["forward", "backward", *AFTER],
}


class Ours:
    """The module's step. Lightning calls its parts in this order."""

    def __init__(self, unet: UNet, width: int) -> None:
        null = torch.zeros(LENGTH, width), torch.ones(LENGTH, dtype=torch.bool), torch.zeros(0)
        parameterization = Eps(peers.TABLE.index)
        self.module = LatentDiffusionModule(
            FirstStage(nn.Identity(), [0.0] * 4, [1.0] * 4),
            TextConditioner(CachedText(*null, digest="")),
            unet,
            parameterization,
            DenoisingLoss(peers.TABLE, Classical(parameterization)),
            caption_dropout=0.1,
            optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.01, fused=True),
            lr_schedule=Warmup(500),
            seed=0,
        )
        self.module.log = lambda *_, **__: None
        self.module._trainer = SimpleNamespace(precision_plugin=None, global_step=0, log_every_n_steps=50)
        made = self.module.configure_optimizers()
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.trainer = SimpleNamespace(global_step=0, world_size=1)
        self.faults, self.ema = Faults("."), EMA(0.9999)
        self.ema.on_train_start(self.trainer, self.module)

    def step(self, latents: Tensor, text: Tensor) -> dict[str, float]:
        n = len(latents)
        batch = Batch(
            moments=torch.cat([latents, torch.full_like(latents, -30)], dim=1).half(), text_tokens=text.half(),
            text_mask=torch.ones(text.shape[:2], dtype=torch.bool), text_vector=torch.zeros(n, 0), index=torch.arange(n),
        )  # fmt: skip
        return measuring.timed(
            {
                "forward": lambda: self.forward(batch),
                "backward": lambda: self.loss.backward(),
                "clip": self.clip,
                "optimizer": self.update,
                "EMA": self.average,
            }
        )

    def forward(self, batch: Batch) -> None:
        self.loss = self.module.training_step(batch, 0)["loss"]

    def clip(self) -> None:
        self.faults.losses = [self.loss.detach()]
        self.faults.on_before_optimizer_step(self.trainer, self.module, self.optimizer)
        self.module.configure_gradient_clipping(self.optimizer, 1.0)

    def update(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def average(self) -> None:
        self.trainer.global_step += 1
        self.ema.on_train_batch_end(self.trainer, self.module)


def inputs(size: str, batch: int) -> tuple[Tensor, Tensor]:
    """Latents (B, 4, side, side) and text (B, L, D)."""
    random = torch.Generator().manual_seed(0)
    side = SIDE if size != "toy" else 8
    width = peers.SIZES[size]["context_channels"]
    return torch.randn(batch, 4, side, side, generator=random), torch.randn(batch, LENGTH, width, generator=random)


def recipe(side: str, size: str, v2: bool = False, compiled: bool = False) -> Ours | peers.TextToImage:
    ours, theirs = peers.unets(size, v2)
    net = ours if side == "ours" else theirs
    if compiled:
        net.compile()  # inductor
    return Ours(net, peers.SIZES[size]["context_channels"]) if side == "ours" else peers.TextToImage(net)


def measure(size: str, batch: int, rounds: int, v2: bool = False, compiled: bool = False) -> dict[str, measuring.Rows]:
    """Seconds of the parts of both sides' steps."""
    given = inputs(size, batch)
    sides = {side: partial(recipe(side, size, v2, compiled).step, *given) for side in SIDES}
    return measuring.alternately(sides, rounds, warmup=2)


def memory(side: str, size: str, batch: int, v2: bool = False) -> int:
    """Bytes that three steps of one side take at most, beyond what is there before its network."""
    given, before = inputs(size, batch), measuring.resident()
    one = recipe(side, size, v2)
    for _ in range(3):
        one.step(*given)
    return max(1, measuring.peak() - before)  # at toy size importing has taken more


def peaks(*given: str) -> list[float]:
    """MiB of each side's `memory`, each in a process of its own."""
    return [int(measuring.in_a_process(__file__, "--memory", side, *given)) / 2**20 for side in SIDES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v2", action="store_true", help="Stable Diffusion v2's attention in place of v1's")
    parser.add_argument("--compile", action="store_true", help="both U-Nets through inductor")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    args = measuring.parsed(parser)
    size = "toy" if args.toy else "81M"
    if args.memory:
        print(memory(args.memory, size, args.batch, args.v2))
        return
    given = ["--batch", str(args.batch), *(["--toy"] if args.toy else []), *(["--v2"] if args.v2 else [])]
    most = peaks(*given)
    rows = measuring.compared(measure(size, args.batch, args.rounds, args.v2, args.compile), GROUPS)
    rows.append(["peak memory, MiB", *(f"{each:.0f}" for each in most), f"{most[0] / most[1]:.3f}"])
    weights = sum(p.numel() for p in peers.unets(size, args.v2)[0].parameters()) / 1e6
    print(measuring.environment("diffusers", threads=torch.get_num_threads()))
    print(f"{weights:.1f}M weights, batch {args.batch}, fp32, {args.rounds} rounds\n")
    print(measuring.table(["ms", "ours", "diffusers", "ratio"], rows))


if __name__ == "__main__":
    main()
