"""What the measurements share: sides in turn, medians, tables, the machine, a process of its own."""

import argparse
import datetime
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Rows = list[dict[str, float]]  # of each round: seconds by part
_clock = time.perf_counter


def now() -> float:
    return _clock()


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the options that all scripts have."""
    global _clock
    parser.add_argument("--toy", action="store_true", help="tiny networks: does it run? Its figures mean nothing")
    parser.add_argument(
        "--shared",
        action="store_true",
        help="processor time in place of the clock's, for a machine that others use: one thread",
    )
    args = parser.parse_args()
    _clock = time.process_time if args.shared else time.perf_counter
    return args


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU unknown")


def environment(*packages: str, threads: int | None = None) -> str:
    """The command, versions, processor, threads and date: what a table has to be read with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    name = Path(sys.argv[0]).resolve()
    script = name.relative_to(ROOT) if name.is_relative_to(ROOT) else name.name
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    used = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    used += ", processor time, the machine shared" if _clock is time.process_time else ""
    cores = len(os.sched_getaffinity(0))
    return f"    {command}\n\n{versions}; {cpu()}, {cores} cores{used}; {datetime.date.today():%Y-%m-%d}\n"


def timed(parts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each part, run in this order."""
    seconds = {}
    for name, part in parts.items():
        start = now()
        part()
        seconds[name] = now() - start
    return seconds


class Clock:
    """Seconds inside functions, since the last reading."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        """From now on, `owner.name(...)` is timed."""
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = now()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += now() - start

        setattr(owner, name, timed)

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def alternately(sides: Mapping[str, Callable[[], dict[str, float]]], rounds: int, warmup: int = 1) -> dict[str, Rows]:
    """Each side's rows of `rounds` rounds. All sides run in each round, every other one in reverse: drift meets all alike."""
    rows: dict[str, Rows] = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name in [*sides][:: 1 if i % 2 == 0 else -1]:
            row = sides[name]()
            if i >= warmup:
                rows[name].append(row)
    return rows


def total(rows: Rows, parts: Iterable[str]) -> list[float]:
    """Seconds of these parts together, each round."""
    parts = list(parts)
    return [sum(row[part] for part in parts) for row in rows]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of ours / theirs of one round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def compared(rows: dict[str, Rows], groups: Mapping[str, Sequence[str]], unit: float = 1e3) -> list[list[str]]:
    """Rows of a table of two sides, ours first: the medians of groups of parts, times `unit`, and ours / theirs."""
    ours, theirs = rows.values()
    out = []
    for name, parts in groups.items():
        pair = total(ours, parts), total(theirs, parts)
        out.append([name, *(f"{statistics.median(side) * unit:.1f}" for side in pair), f"{ratio(*pair):.3f}"])
    return out


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_a_process(script: str, *arguments: str) -> str:
    """The last line that a script prints, in a process of its own."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]
