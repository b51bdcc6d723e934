"""Networks, batches and modules small enough to run in milliseconds; their weights are functions of a seed."""

import contextlib
import multiprocessing
import os
import random
import resource
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.batch import Batch
from ldm.diffusion.loss import DenoisingLoss
from ldm.diffusion.parameterization import V
from ldm.diffusion.schedules import LogNormal
from ldm.diffusion.weighting import Classical
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.conditioners import TextConditioner
from ldm.models.first_stage import FirstStage
from ldm.models.unet import UNet
from ldm.training.latent_diffusion import LatentDiffusionModule
from ldm.training.optim import Warmup

ROOT = Path(__file__).resolve().parents[1]
SIDE = 8  # pixels
WORDS = ["red", "blue", "green", "circle", "square", "small", "large", "sky"]
adam = partial(torch.optim.Adam, lr=1e-3)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same module with small random weights everywhere, also where it starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module


def autoencoder() -> AutoencoderKL:
    """f2, 2 latent channels."""
    return randomized(AutoencoderKL(2, 4, [1, 2], blocks=1, groups=2))


def first_stage() -> FirstStage:
    return FirstStage(autoencoder(), mean=[0.5, -0.25], std=[2.0, 0.5])


class WordEncoder(nn.Module):
    """A text encoder without a tokenizer: one learned state per known word, 4 tokens of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(WORDS) + 1, 8)

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids = [[1 + WORDS.index(word) for word in caption.split()] for caption in captions]
        rows = torch.tensor([[0, *row, *[0] * 3][:4] for row in ids])  # the first token is the start
        mask = torch.tensor([[i <= len(row) for i in range(4)] for row in ids])
        tokens = self.table(rows)
        return tokens, mask, tokens[:, 0] + tokens[:, 1]


def unet() -> UNet:
    return randomized(
        UNet(2, 2, 8, [1, 2], blocks=1, depths=[0, 1], middle_depth=1, context_channels=8, heads=2, vector_channels=8,
             groups=4)
    )  # fmt: skip


def captions(n: int) -> list[str]:
    return [f"{WORDS[i % 3]} {WORDS[3 + i % 2]}" for i in range(n)]


def batch(n: int, start: int = 0, side: int = SIDE) -> Batch:
    """Samples start, ..., start + n - 1: each a function of its number alone."""
    image = torch.stack([_image(i, side) for i in range(start, start + n)])
    return Batch(image=image, caption=captions(start + n)[start:], index=torch.arange(start, start + n))


def _image(number: int, side: int) -> Tensor:
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def rows(part: Batch, keep: list[int]) -> Batch:
    """Some samples of a batch, in this order."""
    return Batch(image=part["image"][keep], caption=[part["caption"][i] for i in keep], index=part["index"][keep])


def latent_diffusion(caption_dropout: float = 0.1, **changes: Any) -> LatentDiffusionModule:
    parts: dict[str, Any] = {
        "first_stage": first_stage(),
        "conditioner": TextConditioner(randomized(WordEncoder(), 1), pooled=True),
        "backbone": unet(),
        "parameterization": V(),
        "loss": DenoisingLoss(LogNormal(), Classical(V())),
        "optimizer": adam,
        "lr_schedule": Warmup(1),
        "seed": 0,
    }
    return LatentDiffusionModule(caption_dropout=caption_dropout, **(parts | changes))


def silent(module: Any) -> dict[str, Tensor]:
    """Makes `module.log` and `module.log_dict` write into the dictionary that is returned: no trainer is needed."""
    logged: dict[str, Tensor] = {}
    write: Callable[..., None] = lambda name, value, **_: logged.__setitem__(name, value)  # noqa: E731
    module.log, module.log_dict = write, lambda values, **_: logged.update(values)
    return logged


def free_port() -> int:
    """One that nobody takes before a rank binds it, seconds later: below those that the system hands out."""
    while True:
        port = random.SystemRandom().randrange(10_000, 15_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def process(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python train.py ...` as a user runs it."""
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env=_environment() | environment, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip


def workers_are_gone() -> bool:
    """Of this process. A busy machine takes its time to end them."""
    end = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    return not multiprocessing.active_children()


def processor_seconds(command: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Of a command run in the project's root, with what came of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def here(script: str, *arguments: str) -> int:
    """The same in this process, where torch is imported already. Returns the exit code."""
    before, argv, environment = dict(os.environ), sys.argv, _environment()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
    return 0


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"} | {"WANDB_MODE": "offline"}
