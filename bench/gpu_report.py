"""How bench/gpu.py measures: seconds by CUDA's events, limits of time, and results that are written after each rung."""

import gc
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PATIENCE = {
    "compiled": 120.0,
    "compile": 150.0,
    "cuda_graphs": 120.0,
    "sampling": 60.0,
}  # seconds at most, by a word of the name
EAGER = 30.0  # of the others
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def seconds(run: Callable[[], Any], device: torch.device, warmup: int, budget: float) -> tuple[float, int]:
    """Of one call, over as many as fit into the budget (2 to 20), after a warm-up; and how many those were."""
    start = time.perf_counter()
    for _ in range(warmup):
        run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    count = max(2, min(20, int(budget / max(time.perf_counter() - start, 1e-6))))
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count, count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count, count


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceiling(device: torch.device, toy: bool) -> float:
    """10^12 operations a second of the best bf16 matrix product."""
    best = 0.0
    for n in (64,) if toy else (4096, 8192, 16384):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        best = max(best, 2 * n**3 / seconds(lambda a=a, b=b: a @ b, device, 3, 0.5)[0] / 1e12)
    return best


class TookTooLong(RuntimeError):
    pass


@contextmanager
def at_most(limit: float) -> Iterator[None]:
    """Raises TookTooLong inside the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TookTooLong(f"more than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """The results, the clock, and how a measurement may fail."""

    def __init__(self, path: Path, device: torch.device, minutes: float) -> None:
        self.path, self.device, self.end = path, device, time.monotonic() + 60 * minutes
        self.results: dict[str, Any] = {}

    def measured(self, case: str, rung: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` gives, or why it did not: out of memory, out of time, another RuntimeError, no time left for it."""
        patience = next((limit for word, limit in PATIENCE.items() if word in rung), EAGER)
        left = self.end - time.monotonic()
        row: dict[str, Any] = {"skipped": f"{left:.0f} s left, it may take {patience:.0f}"}
        if left >= patience / 3:  # most take less than a third
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.monotonic()
            try:
                with at_most(min(patience, left)):
                    row = measure()
            except RuntimeError as error:
                said = str(error).strip().splitlines()
                memory = isinstance(error, torch.cuda.OutOfMemoryError) or any(w in str(error) for w in OUT_OF_MEMORY)
                row = {"failed": OUT_OF_MEMORY[0] if memory else f"{type(error).__name__}: {said[0] if said else ''}"}
            row["took_seconds"] = round(time.monotonic() - began, 1)
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.results.setdefault("cases", {}).setdefault(case, {})[rung] = row
        self.write()
        print(f"{case:14s} {rung:26s} {json.dumps(row)}", flush=True)
        return row

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.rename(self.path)
