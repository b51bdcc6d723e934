"""Where the time of an evaluation goes: generation, features and scores of the demo's networks, end to end.

    OMP_NUM_THREADS=2 python bench/evaluate.py

The demo's networks with random weights (only their size matters here), pictures of the shapes as the reference, the Fréchet
distance and its kin on EfficientNet-Lite0 where it is installed, and the caption oracle. Overhead is all that is neither the
denoiser's network, the decoder nor the feature network: the text encoder, the solver, PNGs, scores, the table.
"""

import argparse
import contextlib
import io
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import measuring
import torch

from ldm import config
from ldm.data import shapes
from ldm.evaluation import generate
from ldm.evaluation.metrics import FeatureMetrics
from ldm.evaluation.scoring import Reference, Round, evaluate
from ldm.models.first_stage import FirstStage
from ldm.training.latent_diffusion import LatentDiffusionModule

METRICS = "[offline,shapes]" if find_spec("efficientnet_lite_pytorch") else "shapes"
NETWORKS = ["denoiser's network", "decoder", "feature network"]


def demo(metrics: str) -> tuple[LatentDiffusionModule, config.DictConfig]:
    """The demo's module, untrained, and its config."""
    first = config.build(config.compose("experiment=demo_autoencoder").model.autoencoder)
    cfg = config.compose("experiment=demo", "model/first_stage=pixels", f"metrics={metrics}")
    module = config.build(cfg.model)
    module.first_stage = FirstStage(first, [0.0] * first.latent_channels, [1.0] * first.latent_channels)
    return module.eval(), cfg


def reference(n: int, side: int) -> Reference:
    scenes = [shapes._sample(0, 1, i) for i in range(n)]
    images = torch.stack([torch.from_numpy(shapes.render(scene, side)) for scene, _ in scenes])
    return Reference(images.permute(0, 3, 1, 2).contiguous(), [text for _, text in scenes])


def measure(n: int, batch: int, steps: int, metrics: str) -> dict[str, float]:
    """Seconds of an evaluation by part; "all" is the whole."""
    module, cfg = demo(metrics)
    cfg.sampling.steps = steps
    scores = config.build_each(cfg.metrics)
    parts = {
        NETWORKS[0]: [(module.denoiser.backbone, "forward")],
        NETWORKS[1]: [(module.first_stage.autoencoder, "decode")],
        NETWORKS[2]: [(metric.features, "encode") for metric in scores if isinstance(metric, FeatureMetrics)],
        "text encoder": [(module.conditioner.encoder, "forward")],
        "shards of PNGs": [(generate, "_write")],
        "Fréchet and other scores": [(metric, "compute") for metric in scores],
    }
    clocks = {name: measuring.Clock() for name in parts}
    make = partial(module.sample, config.build(cfg.sampling), side=cfg.data.side, seed=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = reference(n, cfg.data.side)
        module.sample(config.build(cfg.sampling), given.captions[:2], torch.arange(2), cfg.data.side, 0)  # warms up
        for name, watched in parts.items():
            for owner, function in watched:
                clocks[name].watch(owner, function)
        start = measuring.now()
        rounds = [Round("bench", make, {"sampling": config.plain(cfg.sampling), "weights": "ema"})]
        evaluate(rounds, given, scores, Path(folder), 0, batch, 16, cache=Path(folder) / "cache")
        seconds = measuring.now() - start
    return {**{name: clock.read() for name, clock in clocks.items()}, "all": seconds}


def overhead(row: dict[str, float]) -> float:
    """Share of the whole that no network takes."""
    return 1 - sum(row[name] for name in NETWORKS) / row["all"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    args = measuring.parsed(parser)
    n, steps, metrics = (4, 2, "shapes") if args.toy else (args.n, 20, METRICS)
    row = measure(n, args.batch, steps, metrics)
    print(measuring.environment(threads=torch.get_num_threads()))
    print(
        f"{n} pictures of the demo's size in batches of {args.batch}, {steps} steps with guidance, metrics={metrics}\n"
    )
    rest = row["all"] - sum(value for name, value in row.items() if name != "all")
    lines = {**row, "all": rest, "whole": row["all"]}
    names = {"all": "all else"}
    print(
        measuring.table(
            ["part", "s", "share"],
            [[names.get(name, name), f"{s:.3f}", f"{100 * s / row['all']:.2f} %"] for name, s in lines.items()],
        )
    )
    print(f"overhead: {100 * overhead(row):.2f} %; {n / row['all']:.1f} pictures/s end to end")


if __name__ == "__main__":
    main()
