"""Our solver and guidance beside diffusers' StableDiffusionPipeline: one U-Net, one decoder, one start, 20 steps of DDIM.

    OMP_NUM_THREADS=2 python bench/sample.py [--v2]

Text is given as embeddings. "network" is the time inside the U-Net's forward, "outside" the rest of the loop.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import diffusers
import measuring
import peers
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion import solvers
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.parameterization import Eps
from ldm.diffusion.sampling import Sampling
from ldm.diffusion.schedules import Leading
from ldm.keyed_random import KeyedRandom
from ldm.models.first_stage import FirstStage

SCALE, LENGTH = 7.5, 77
FACTOR = 0.18215  # of Stable Diffusion's latents


class Sides:
    """The two samplers: noise (B, 4, h, w) -> latents, and latents -> pictures in about [-1, 1]."""

    def __init__(self, size: str, batch: int, steps: int, v2: bool) -> None:
        side, random = 32 if size != "toy" else 8, torch.Generator().manual_seed(0)
        self.sampling = Sampling(solvers.euler, peers.TABLE, Guidance(SCALE), steps, Leading())
        width = peers.SIZES[size]["context_channels"]
        self.random, self.shape = KeyedRandom(0, torch.arange(batch)), (4, side, side)
        self.text, self.null = (torch.randn(batch, LENGTH, width, generator=random) for _ in range(2))
        nets, vaes = peers.unets(size, v2), peers.autoencoders(size)
        for net in (*nets, *vaes):
            net.eval().requires_grad_(False)
        self.denoiser = Denoiser(nets[0], Eps(peers.TABLE.index))
        self.first_stage = FirstStage(vaes[0], [0.0] * 4, [1 / FACTOR] * 4)
        scheduler = diffusers.DDIMScheduler(**peers.SD, **peers.DISCRETE)
        self.pipeline = diffusers.StableDiffusionPipeline(
            vae=vaes[1], text_encoder=None, tokenizer=None, unet=nets[1], scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        self.clocks = measuring.Clock(), measuring.Clock()
        for clock, net in zip(self.clocks, nets, strict=True):
            clock.watch(net, "forward")

    def ours(self) -> Tensor:
        cond, null = (Conditioning(rows, torch.ones(rows.shape[:2], dtype=torch.bool), torch.zeros(len(rows), 0))
                      for rows in (self.text, self.null))  # fmt: skip
        return self.sampling(self.denoiser, cond, null, self.random, self.shape)

    def theirs(self) -> Tensor:
        pixels, sigma = self.shape[-1] * self.pipeline.vae_scale_factor, self.sampling.sigmas()[0]
        start = self.random.normal("sampling", self.shape) * sigma * (1 + sigma**2).rsqrt()  # in their coordinate
        return self.pipeline(
            prompt_embeds=self.text, negative_prompt_embeds=self.null, latents=start, guidance_scale=SCALE,
            num_inference_steps=self.sampling.steps, output_type="latent", height=pixels, width=pixels,
        ).images  # fmt: skip

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        return self.first_stage.decode(latents)

    @torch.no_grad()
    def decoded_by_theirs(self, latents: Tensor) -> Tensor:
        return self.pipeline.vae.decode(latents / FACTOR, return_dict=False)[0]

    def row(
        self, sample: Callable[[], Tensor], decode: Callable[[Tensor], Tensor], clock: measuring.Clock
    ) -> dict[str, float]:
        start = measuring.now()
        latents = sample()
        sampled = measuring.now()
        decode(latents)
        network = clock.read()
        return {"network": network, "outside": sampled - start - network, "decode": measuring.now() - sampled}


def measure(
    size: str, batch: int, steps: int, rounds: int, v2: bool = False
) -> tuple[dict[str, measuring.Rows], float]:
    """Seconds of both sides' parts; the largest difference between their pictures."""
    sides = Sides(size, batch, steps, v2)
    difference = (sides.decoded(sides.ours()) - sides.decoded_by_theirs(sides.theirs())).abs().max().item()
    for clock in sides.clocks:
        clock.read()
    turns = {
        "ours": partial(sides.row, sides.ours, sides.decoded, sides.clocks[0]),
        "diffusers": partial(sides.row, sides.theirs, sides.decoded_by_theirs, sides.clocks[1]),
    }
    return measuring.alternately(turns, rounds, warmup=0), difference


LOOP = ["network", "outside"]
GROUPS = {"network": LOOP[:1], "outside the network": LOOP[1:], "sampling": LOOP, "decode": ["decode"],
          "sampling and decode": [*LOOP, "decode"]}  # fmt: skip


def overhead(rows: measuring.Rows) -> float:
    """Share of a sample's time that is outside the network."""
    return statistics.median(row["outside"] / (row["outside"] + row["network"]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v2", action="store_true", help="Stable Diffusion v2's attention in place of v1's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = measuring.parsed(parser)
    rows, difference = measure("toy" if args.toy else "81M", args.batch, args.steps, args.rounds, args.v2)
    print(measuring.environment("diffusers", threads=torch.get_num_threads()))
    print(
        f"batch {args.batch}, {args.steps} steps, guidance {SCALE}, fp32, {args.rounds} rounds; largest difference of a ",
        end="",
    )
    print(f"picture in [-1, 1]: {difference:.1e}\n")
    shares = [overhead(each) for each in rows.values()]
    rate = [
        args.batch / statistics.median(measuring.total(each, GROUPS["sampling and decode"])) for each in rows.values()
    ]
    lines = measuring.compared(rows, GROUPS)
    lines.append(["share outside the network, %", *(f"{100 * share:.2f}" for share in shares), ""])
    lines.append(["images/s with decode", *(f"{each:.3f}" for each in rate), f"{rate[0] / rate[1]:.3f}"])
    print(measuring.table(["ms", "ours", "diffusers", "ratio"], lines))


if __name__ == "__main__":
    main()
