"""Have the ratios that need no GPU kept their bars? Measures them again and fails past a margin: for a machine that is idle.

    OMP_NUM_THREADS=2 python bench/check.py [--margin 0.05]

A value passes while it is at most its bar times 1 + margin, which is what the machine's own noise may add. About 5 minutes.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import loading
import measuring
import sample
import startup
import torch
import train_step

import evaluate
from ldm.data.stream import batches

Value = tuple[str, float, float]  # what, measured, its bar: the smaller, the better


def training(size: str) -> Iterator[Value]:
    ours, theirs = train_step.measure(size, batch=2, rounds=5).values()
    for name, bar in (("step", 0.90), ("clip + optimizer + EMA", 0.50)):
        parts = train_step.GROUPS[name]
        yield (
            f"training, {name}: ours / diffusers",
            measuring.ratio(*(measuring.total(s, parts) for s in (ours, theirs))),
            bar,
        )
    most = train_step.peaks("--batch=2", *(["--toy"] if size == "toy" else []))
    yield "training, peak memory: ours / diffusers", most[0] / most[1], 1.0


def sampling(size: str) -> Iterator[Value]:
    rows, _ = sample.measure(size, batch=2, steps=20 if size != "toy" else 2, rounds=2)
    ours, theirs = (measuring.total(side, sample.LOOP) for side in rows.values())
    yield "sampling: ours / diffusers", measuring.ratio(ours, theirs), 0.95
    yield "sampling, share outside the network", sample.overhead(rows["ours"]), 0.03


def evaluation(size: str) -> Iterator[Value]:
    given = (4, 4, 2, "shapes") if size == "toy" else (256, 128, 20, evaluate.METRICS)
    yield "evaluation, share that no network takes", evaluate.overhead(evaluate.measure(*given)), 0.05


def reading(size: str) -> Iterator[Value]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count = 2 if size == "toy" else 8
    with tempfile.TemporaryDirectory() as folder:
        paths = loading.write(Path(folder))
        sides = {
            "ours": lambda: {"s": 1 / loading.rate(lambda: batches(loading.stream(paths), 0), count)},
            "webdataset": lambda: {"s": 1 / loading.rate(lambda: loading.plain(paths), count)},
        }
        rows = measuring.alternately(sides, 3, warmup=0)
    torch.set_num_threads(threads)
    yield (
        "reading JPEG: ours / webdataset + Pillow",
        measuring.ratio(*(measuring.total(s, "s") for s in rows.values())),
        0.4,
    )


def starting(_: str) -> Iterator[Value]:
    for name, (words, code, bar) in startup.QUICK.items():
        yield f"start, s: {name}", statistics.median(startup.seconds(words, code) for _ in range(3)), bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--margin", type=float, default=0.05)
    args = measuring.parsed(parser)
    # evaluation first: small passes suffer from the heap that big networks leave
    checks = (evaluation, training, sampling, reading, starting)
    values = [value for check in checks for value in check("toy" if args.toy else "81M")]
    late = [name for name, value, bar in values if value > bar * (1 + args.margin)]
    print(measuring.environment("diffusers", threads=torch.get_num_threads()))
    rows = [[name, f"{value:.3f}", f"{bar:g}", "TOO MUCH" if name in late else "ok"] for name, value, bar in values]
    print(measuring.table(["", "measured", f"bar (+ {100 * args.margin:g} %)", ""], rows))
    sys.exit(bool(late))


if __name__ == "__main__":
    main()
