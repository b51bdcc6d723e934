"""`python train.py ...` in processes that can be killed, forked from one that has imported everything: a quick start."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import write_shards
from tiny import ROOT, free_port

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["ldm.config", "ldm.training.autoencoder", "ldm.training.callbacks", "ldm.training.checkpointing", "ldm.data.datamodule",
     "ldm.training.throughput", "ldm.training.faults"]
)  # fmt: skip

SMALL = ["experiment=demo_autoencoder", "trainer=cpu", "logger=none", "callbacks.progress=null", "callbacks.pictures=null",
         "callbacks.latents=null", "trainer.enable_progress_bar=false", "model/lr_schedule=warmup",
         "model.lr_schedule.warmup=2", "trainer.log_every_n_steps=1", "trainer.gradient_clip_val=1.0", "data.side=16",
         "data.batch_size=4", "data.val_samples=4", "data.val_batch_size=4", "data.num_workers=0",
         "model.autoencoder.channels=8", "model.autoencoder.latent_channels=2"]  # fmt: skip
TWO = ["trainer=ddp_cpu"]
TWO_SHARDED = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]


def arguments(run_dir: Path, shards: str, steps: int, *more: str) -> list[str]:
    """Of a small run with one validation, at its end."""
    last = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    return [*SMALL, f"data.shards={shards}", "data.val_shards=null", f"run_dir={run_dir}", *last, *more]


def shards(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return write_shards(folder, [12, 10, 14, 12, 9])


def start(words: Sequence[str], log: Path, rank: int = 0, world: int = 1, port: int = 0,
          first: Callable[[], None] | None = None) -> BaseProcess:  # fmt: skip
    """One rank. first: what to do in it before, a function of a module."""
    process = FORK.Process(target=_run, args=(list(words), str(log), rank, world, port, first))
    process.daemon = True  # what a failed test leaves behind ends with pytest
    process.start()
    return process


def start_ranks(words: Sequence[str], log: Path, world: int = 2,
                first: Callable[[], None] | None = None) -> list[BaseProcess]:  # fmt: skip
    """As torchrun starts them. Each writes its own log: log.0, log.1 ..."""
    port = free_port()
    return [start(words, Path(f"{log}.{rank}"), rank, world, port, first) for rank in range(world)]


def finish(process: BaseProcess, seconds: float = 90) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def last_step(run_dir: Path) -> int:
    """That metrics.jsonl tells of."""
    path = run_dir / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return int(rows[-1].split(",")[0].removeprefix('{"step": ')) if rows else 0


def _run(words: list[str], log: str, rank: int, world: int, port: int, first: Callable[[], None] | None) -> None:
    import torch
    from pytorch_lightning.utilities import rank_zero_only

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                       "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
        rank_zero_only.rank = rank  # read from the environment at its import, which was in the server
    if first is not None:
        first()
    os.environ.setdefault("WANDB_MODE", "offline")
    sys.argv = ["train.py", *words]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
