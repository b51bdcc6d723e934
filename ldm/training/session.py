"""What a person sees at the beginning, at the end, and when something is out of the ordinary."""

import json
import logging
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from torch import nn

from ldm.data.manifest import expected
from ldm.data.remote import shown
from ldm.data.shards import BadSample
from ldm.training.base import TrainingModule
from ldm.training.ema import EMA, Average
from ldm.training.strategies import FullySharded

COUNTED = 2000  # shards whose side files are read for the banner


def quiet() -> None:
    """Keeps Lightning's advice off the screen: the banner says what matters."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    advice = ["does not have many workers", "LeafSpec", "tensorboard", "Checkpoint directory", "in eval mode"]
    # one rank needs no srun; what is logged without sync_dist is reduced already
    advice += ["The `srun` command is available", "It is recommended to use `self.log"]
    for message in (*advice, "your dataloader is not resumable"):  # it resumes: see data/datamodule.py
        warnings.filterwarnings("ignore", f".*{message}")


@rank_zero_only
def say(text: str) -> None:
    """A line that a person should read, once for all ranks."""
    Console(highlight=False, soft_wrap=True).print(f"  {text}", markup=False)


def complain(text: str) -> None:
    """A line on stderr, from any rank."""
    print(f"error: {text}", file=sys.stderr, flush=True)


@rank_zero_only
def banner(
    name: str,
    run_dir: Path,
    module: TrainingModule,
    data: LightningDataModule,
    trainer: Trainer,
    step: int,
    source: str | Path | None = None,
) -> None:
    """What is trained, on what, how long and where: one screen.

    Args:
        source: the checkpoint that the run goes on from, or the run whose weights it starts with.
    """
    console = Console(highlight=False, soft_wrap=True)
    if step >= trainer.max_steps:
        begins = f"is complete at step {step:,}: nothing to do; raise trainer.max_steps to go on"
    elif step:
        begins = f"continues from step {step:,}{f' ({Path(source).name})' if source else ''}"
    else:
        begins = f"starts at step 0{f', from the weights of {source}' if source else ''}"
    count, described = _data(data)
    ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    epochs = f", {trainer.max_steps * data.batch_size / count:,.3g} epochs" if count else ""
    averages = [each for each in trainer.callbacks if isinstance(each, Average)]
    strategy, dropout = trainer.strategy, getattr(module, "caption_dropout", None)
    parts = ranks // (strategy.replicas or trainer.num_nodes) if isinstance(strategy, FullySharded) else 1
    rows = {
        "run": f"{run_dir} {begins}",
        "model": _sizes(module),
        "batch": f"{data.batch_size} = {data.batch_size // (ranks * accumulate)}"
        f"{f' x {accumulate} accumulated' if accumulate > 1 else ''} x {ranks} rank{'s' if ranks > 1 else ''}",
        "steps": f"{trainer.max_steps:,}: {trainer.max_steps * data.batch_size:,} samples{epochs}",
        "rate": _rates(module, trainer.max_steps),
        "precision": f"{trainer.precision}, on {trainer.strategy.root_device.type}",
        "memory": _memory(module, sum(len(getattr(each, "exponents", [1])) for each in averages), parts),
        "data": described,
        "captions": None if dropout is None else f"{dropout:.0%} dropped, for guidance",
        "average": ", ".join(_average(each) for each in averages) or "none",
        "W&B": next((_where(each, run_dir) for each in trainer.loggers if isinstance(each, WandbLogger)), "off"),
    }
    console.print(f"[bold]{name}[/]: {type(module).__name__}")
    for key, value in rows.items():
        if value is not None:
            console.print(f"  [dim]{key:9}[/]  {escape(value)}")


def _sizes(module: nn.Module) -> str:
    """Millions of parameters, of the whole and of the parts that are trained."""
    sizes = {flag: sum(p.numel() for p in module.parameters() if p.requires_grad == flag) for flag in (True, False)}
    parts = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in module.named_children()
    }
    told = ", ".join(f"{name} {_millions(size)}" for name, size in parts.items() if size)
    return f"{_millions(sizes[True])} parameters trained ({told}), {_millions(sizes[False])} frozen"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.3g}M" if number < 1e9 else f"{number / 1e9:,.3g}B"


def _rates(module: TrainingModule, steps: int) -> str:
    """The optimizer and its learning rate at the beginning, after the warm-up, half way, and at the last step."""
    options = getattr(module.optimizer_factory, "keywords", {})
    rate, name = (
        options.get("lr", math.nan),
        getattr(module.optimizer_factory, "func", module.optimizer_factory).__name__,
    )
    warmup = getattr(module.lr_schedule, "warmup", 0)
    places = {"at first": 0, f"after warm-up ({warmup:,})": warmup, "half way": steps // 2, "at last": steps - 1}
    return f"{name}: " + ", ".join(f"{rate * module.lr_schedule(at):.2g} {where}" for where, at in places.items())


def _memory(module: TrainingModule, averages: int, shards: int) -> str:
    """What stays from step to step on a device; activations come on top. Adam's kin keep two numbers a weight."""
    own, frozen = (
        sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad == flag)
        for flag in (True, False)
    )
    trained = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad) / shards
    sizes = {
        "weights": own / shards + frozen,
        "gradients": trained,
        "optimizer": 2 * trained,
        "averages": averages * trained,
    }
    total = sum(sizes.values())
    unit, name = (2**30, "GB") if total >= 2**30 else (2**20, "MB")
    told = ", ".join(f"{part} {size / unit:,.1f}" for part, size in sizes.items())
    return f"{total / unit:,.1f} {name} before activations: {told}"


def _data(data: LightningDataModule) -> tuple[int | None, str]:
    """How many samples there are to train on, if that is known without reading them; and what they are."""
    size = f"{data.side} px"
    if hasattr(data, "rows"):
        return data.rows, f"{data.rows:,} latents in {data.folder}, of {size}"
    paths = [path for source in data.sources for path in source.paths]
    known = len(paths) <= COUNTED and all(Path(path).is_file() for path in paths)
    counts: list[Any] = [_count(data, path) for path in paths] if known else [None]
    total = None if None in counts else sum(counts)
    filters = ", ".join(getattr(data.decode, "filters", {})) or "none"
    samples = f" of {total:,} samples" if total else ""
    return total, f"{len(paths):,} shards{samples} ({shown(paths[0])} ...), {size}, filters: {filters}"


def _count(data: LightningDataModule, shard: str) -> int | None:
    try:
        return expected(partial(data.cache.sidecar, shard))
    except BadSample:
        return None


def _average(average: Average) -> str:
    if isinstance(average, EMA):
        return f"EMA of decay {average.decay}"
    return f"{type(average).__name__} of lengths {', '.join(average.exponents)}"


def _where(logger: WandbLogger, run_dir: Path) -> str:
    return logger.experiment.url or f"offline in {run_dir}/wandb; `wandb sync` uploads it"


@rank_zero_only
def farewell(run_dir: Path, trainer: Trainer) -> None:
    """The last validation, and where its pictures are."""
    console = Console(highlight=False, soft_wrap=True)
    validated = [row for row in _rows(run_dir / "metrics.jsonl") if any(key.startswith("val/") for key in row)]
    if validated:
        values = ("loss", "psnr", "kl", "distance")
        last = {key: math.nan if value is None else value for key, value in validated[-1].items()}
        shown = [f"{k} {last[f'val/{k}']:.4g}" for k in values if f"val/{k}" in last]
        console.print(f"  validation at step {validated[-1]['step']}: {', '.join(shown)}")
    pictures = sorted((run_dir / "samples").glob("*.png"))
    if pictures:
        console.print(f"  pictures: {pictures[-1]}")


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
