"""From the command to its answer: a refused typo, `--cfg job`, the first training step of the demo.

    python bench/startup.py [--rounds 5] [key=value ...]

What is left of the command line goes to the first step's, such as another data.shards or model.first_stage.run; by default it
wants what `make demo` leaves behind: data/shapes and runs/demo_autoencoder.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import measuring

TRAIN = [sys.executable, "train.py", "experiment=demo"]
QUICK = {  # what ends at once: its words, its exit code, and how many seconds it may take
    "a refused key, trainer.max_step=5": ([*TRAIN, "trainer.max_step=5"], 2, 1.5),
    "a refused choice, model/backbone=unet_sd3": ([*TRAIN, "model/backbone=unet_sd3"], 2, 1.5),
    "--cfg job": ([*TRAIN, "--cfg", "job"], 0, 2.0),
}


def seconds(command: Sequence[str], code: int) -> float:
    """Of a command that ends with this exit code."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=measuring.ROOT, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - start
    assert done.returncode == code, done.stderr[-2000:]
    return taken


def first_step(overrides: Sequence[str]) -> float:
    """Until the first step's loss is in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        command = [*TRAIN, f"run_dir={log.parent}", "trainer.max_steps=1", "trainer.log_every_n_steps=1", "logger=none",
                   "trainer.val_check_interval=1000", *overrides]  # fmt: skip
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=measuring.ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        while not (log.exists() and "train/loss" in log.read_text()):
            if process.poll() is not None:
                raise RuntimeError(process.stderr.read()[-2000:])
            time.sleep(0.01)
        taken = time.perf_counter() - start
        process.communicate()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    cases = {name: (partial(seconds, words, code), bar) for name, (words, code, bar) in QUICK.items()}
    cases["the first step of the demo"] = partial(first_step, args.overrides), 15.0
    rows = []
    for name, (run, bar) in cases.items():
        run()  # from the disk
        taken = [run() for _ in range(args.rounds)]
        rows.append([name, *(f"{f(taken):.2f}" for f in (statistics.median, min, max)), f"{bar:g}"])
    print(measuring.environment("hydra-core", "pytorch-lightning"))
    print(f"{args.rounds} rounds, after one that warms up the disk's cache\n")
    print(measuring.table(["command", "s, median", "lowest", "highest", "bar"], rows))


if __name__ == "__main__":
    main()
