"""Is the sequence of samples a function of (seed, shard list, filters) alone? Real processes, real kills, the key log.

    python bench/key_log.py 'data/shapes/train/{00000..00011}.tar'

Trains a model of one number on each of world 1, 2, 4 x workers 0, 1, 2, with a filter on and across the end of an epoch; then a
run that is killed three times (SIGKILL to all its ranks and workers) and goes on each time on another number of ranks and
workers. All must have logged the same global batches.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

GRID = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 2)]


def train(args: argparse.Namespace) -> None:
    """One rank's process (Lightning starts the others); goes on from the newest checkpoint of run_dir."""
    import pytorch_lightning as pl
    import torch

    from ldm.data.datamodule import ShardDataModule
    from ldm.data.decode import DecodeSample
    from ldm.data.filters import CaptionLength
    from ldm.training import checkpointing, session
    from ldm.training.callbacks import DataPosition

    class OneNumber(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: dict, _: int) -> torch.Tensor:
            return self.weight * batch["image"].float().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-6)

    session.quiet()
    torch.set_num_threads(1)
    decode = DecodeSample(32, random_crop=True, random_flip=True, filters={"length": CaptionLength(0, args.longest)})
    data = ShardDataModule(
        args.shards, args.val_shards, decode, side=32, batch_size=args.batch_size, steps=args.steps, seed=0,
        val_batch_size=8, run_dir=args.run_dir, val_samples=8, num_workers=args.workers, max_streams=8, shuffle=64,
        log_keys=True,
    )  # fmt: skip
    folder = Path(args.run_dir)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=args.world, strategy="ddp" if args.world > 1 else "auto", max_steps=args.steps,
        max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[DataPosition(args.run_dir), checkpointing.Checkpoint(args.run_dir, every=3)],
    )  # fmt: skip
    trainer.fit(OneNumber(), datamodule=data, ckpt_path=checkpointing.newest(folder), weights_only=True)


def start(run_dir: Path, world: int, workers: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, *options, f"--run_dir={run_dir}", f"--world={world}", f"--workers={workers}"]
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    log = (run_dir.parent / f"{run_dir.name}.log").open("ab")
    return subprocess.Popen(command, env=keep, start_new_session=True, stdout=log, stderr=log)


def finish(run_dir: Path, world: int, workers: int, options: Sequence[str]) -> None:
    if start(run_dir, world, workers, options).wait() != 0:
        raise RuntimeError((run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:])


def kill_at(run_dir: Path, step: int, world: int, workers: int, options: Sequence[str]) -> None:
    """Starts, and kills every process of it once its first rank has logged `step`."""
    process = start(run_dir, world, workers, options)
    while last_step(run_dir) < step:
        if process.poll() is not None:
            raise RuntimeError((run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:])
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_step(run_dir: Path) -> int:
    path = run_dir / "keys" / "rank0.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def global_batches(run_dir: Path) -> list[list[str]]:
    """The keys of each step in the order of the sequence: rank r of W holds its samples r, r + W, ..."""
    parts: dict[int, dict[int, list[str]]] = {}
    for path in (run_dir / "keys").glob("rank*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            parts.setdefault(row["step"], {})[int(path.stem.removeprefix("rank"))] = row["keys"]
    assert sorted(parts) == list(range(1, len(parts) + 1))
    return [
        [key for row in zip(*(ranks[r] for r in sorted(ranks)), strict=True) for key in row]
        for _, ranks in sorted(parts.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--val_shards", help="default: the last of the shards")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--longest", type=int, default=80, help="captions of more characters are filtered out")
    parser.add_argument("--grid", default=str(GRID), help="(world, workers) pairs")
    parser.add_argument("--run_dir", help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_dir:
        train(args)
        return
    options = sys.argv[1:]
    grid = json.loads(args.grid.replace("(", "[").replace(")", "]"))
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for world, workers in grid:
            runs[f"world {world}, workers {workers}"] = run_dir = Path(folder) / f"{world}_{workers}"
            finish(run_dir, world, workers, options)
        draw = random.Random(0)
        steps = sorted(draw.sample(range(2, args.steps), 3))
        killed = Path(folder) / "killed"
        for step, (world, workers) in zip(steps, draw.choices(grid, k=3), strict=True):
            kill_at(killed, step, world, workers, options)
        finish(killed, *draw.choice(grid), options)
        runs[f"killed after steps {', '.join(map(str, steps))}"] = killed
        batches = {name: global_batches(run_dir) for name, run_dir in runs.items()}
        reports = {name: json.loads((run_dir / "data_report.json").read_text()) for name, run_dir in runs.items()}
    first = next(iter(batches.values()))
    keys = [key for batch in first for key in batch]
    print(
        f"{args.shards}: {len(first)} steps of {args.batch_size}, {len(set(keys))} different samples among {len(keys)}"
    )
    for name, got in batches.items():
        same = "identical" if got == first else "DIFFERENT"
        print(f"| {name} | {len(got)} steps | {same} | dropped {reports[name]['dropped']} |")
    sys.exit(any(got != first for got in batches.values()))


if __name__ == "__main__":
    main()
