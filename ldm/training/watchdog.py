"""Ends a run of several ranks in which one no longer moves, and names that one."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.errors import UserError
from ldm.files import aside
from ldm.training.session import complain

STALLED = 70  # EX_SOFTWARE, the exit code
WATCHED = ("waiting for data", "in the training step")


class Mark(NamedTuple):
    """count: of marks so far, the same on all ranks that are at the same point; since: time.monotonic()."""

    count: int  # type: ignore[assignment]  # in place of tuple's
    step: int
    phase: str
    since: float


class Watchdog(Callback):
    """When a rank has stood for `timeout` seconds in one phase of training (validation, saving and the first two steps,
    which compile, are not watched), says which rank is late and in which phase, and ends the process with exit code 70.

    A thread of each rank keeps run_dir/ranks/<r>.json up to date: a stopped process shows by its file that no longer changes,
    one that hangs by its lower count. A collective that waits for it could say neither.

    Args:
        run_dir: the run's directory, which all ranks see.
        timeout: seconds, above 0.
    """

    def __init__(self, run_dir: str, timeout: float = 120.0) -> None:
        if not timeout > 0:
            raise UserError(f"callbacks.watchdog.timeout={timeout}; give a number of seconds above 0")
        self.folder, self.timeout = Path(run_dir) / "ranks", timeout
        self.mark = Mark(0, 0, "starting", time.monotonic())
        self.done = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first, self.rank, self.world = trainer.global_step, trainer.global_rank, trainer.world_size
        if self.world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        # Throughput counts the first one's operations, which torch does uncompiled: the second compiles
        self._enter(WATCHED[1] if trainer.global_step > self.first + 1 else "in the first steps", trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._enter(WATCHED[0], trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("validating", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(WATCHED[0], trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._enter("saving", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.done.set()

    def _enter(self, phase: str, trainer: Trainer) -> None:
        self.mark = Mark(self.mark.count + 1, trainer.global_step, phase, time.monotonic())

    def _write(self) -> None:
        with aside(self.folder / f"{self.rank}.json") as partial:
            partial.write_text(json.dumps(self.mark._asdict()))

    def _watch(self) -> None:
        while not self.done.wait(self.timeout / 10):
            self._write()
            mark = self.mark
            if mark.phase in WATCHED and time.monotonic() - mark.since > self.timeout:
                late = self._late()
                if self.rank == min(set(range(self.world)) - late.keys()):
                    text = "; ".join(f"rank {rank} is {why}" for rank, why in late.items()) or "no rank is behind"
                    complain(
                        f"step {mark.step + 1} has stood still for {self.timeout:g} s: {text}. The same command goes on"
                    )
                os._exit(STALLED)  # the main thread waits in a collective that nothing ends

    def _late(self) -> dict[int, str]:
        """Rank -> why, of those that no longer live, or else of those behind the others, if not all are."""
        files = [self.folder / f"{rank}.json" for rank in range(self.world)]
        marks = [Mark(**json.loads(file.read_text())) for file in files]
        silent = [files[self.rank].stat().st_mtime - file.stat().st_mtime for file in files]
        late = {
            rank: f"{mark.phase} of step {mark.step + 1}, silent for {seconds:.0f} s: dead or stopped"
            for rank, (mark, seconds) in enumerate(zip(marks, silent, strict=True))
            if seconds > self.timeout / 2
        }
        last = min(mark.count for mark in marks)
        if not late and last < max(mark.count for mark in marks):
            late = {
                r: f"{m.phase} of step {m.step + 1}, behind the others" for r, m in enumerate(marks) if m.count == last
            }
        return late


@contextmanager
def unwatched(trainer: Trainer, phase: str) -> Iterator[None]:
    """What takes its time within, between two steps, is not taken for a rank that stands still."""
    watchdogs = [callback for callback in trainer.callbacks if isinstance(callback, Watchdog)]
    for watchdog in watchdogs:
        watchdog._enter(phase, trainer)
    yield
    for watchdog in watchdogs:
        watchdog._enter(WATCHED[0], trainer)
