"""Checkpoints: complete or invisible, plain data only, with a manifest; the newest that is whole is gone on from."""

import errno
import json
import math
import os
import platform
import re
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, distributed
from torch.utils._pytree import tree_map

from ldm.errors import UserError
from ldm.files import sha256
from ldm.training import interrupt
from ldm.training.session import say

FORMAT = 2  # 1 had no number, no manifest and no account of faults
_NAME = re.compile(r"step_(\d{8})\.ckpt")


def by_step(run_dir: Path) -> list[Path]:
    """The checkpoints in run_dir/checkpoints, the newest last."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step_*.ckpt") if _NAME.fullmatch(p.name))


def newest(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    return next(reversed(by_step(run_dir)), None)


def best_of(run_dir: Path) -> dict[str, Any] | None:
    """step, name and value of the best checkpoint; None where none was asked for."""
    path = run_dir / "checkpoints" / "best.json"
    return json.loads(path.read_text()) if path.is_file() else None


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint was written after, by its name."""
    return int(path.stem.removeprefix("step_"))


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's plain data on the CPU; never unpickles code.

    Raises:
        UserError: the file cannot be read as one, or a newer version wrote it.
    """
    checkpoint = _load(path)
    _refuse_newer(checkpoint)
    return checkpoint


def resume_from(run_dir: Path, how: str) -> Path | None:
    """The newest checkpoint that is whole. What it passes over, it says.

    Args:
        how: `auto`: that one, or None where there is none; `must`: there has to be one; `never`: there may be none.

    Raises:
        UserError: how, or what there is against it; or none of those there are is whole.
    """
    if how not in ("auto", "must", "never"):
        raise UserError(f"resume={how}; give auto, must (there has to be a checkpoint) or never (there may be none)")
    found = by_step(run_dir)
    if found and how == "never":
        raise UserError(f"resume=never, but {found[-1]} is there: give another name=, or delete {run_dir}")
    for path in reversed(found):
        damage = find_damage(path)
        if not damage:
            return path
        say(f"{path} is passed over: {damage}")
    if found:
        raise UserError(f"no checkpoint in {found[-1].parent} is whole: delete that folder to begin at step 0 again")
    if how == "must":
        raise UserError(
            f"resume=must, but {run_dir} has no checkpoint: give the name= of a run that has, or resume=auto"
        )
    return None


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint: "" when its bytes are those of its manifest; without one, when it can be read."""
    try:
        written = json.loads(path.with_suffix(".json").read_text())["files"][path.name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # killed before it was written, or of a version that wrote none
        try:
            return "" if "state_dict" in _load(path) else "it is no checkpoint"
        except UserError as error:
            return str(error)
    return "" if sha256(path) == written else "its bytes are not those that were written (sha256)"


class Checkpoint(Callback):
    """Writes run_dir/checkpoints/step_<n>.ckpt every `every` optimizer steps, at the end, and when a signal asks to stop,
    which then ends the process with exit code 75.

    Written aside, flushed to disk and renamed, so that a kill at any moment leaves the one before it whole. Beside it,
    step_<n>.json: digests, step, samples seen, versions. One that cannot be written is a warning while there is another.

    Args:
        run_dir: the run's directory.
        every: steps.
        keep: how many of the last are kept.
        keep_every: those whose step it divides are kept forever; None: none.
        best: a logged value, such as val/loss; the checkpoint after the validation where it was best is kept, and
            checkpoints/best.json says which and why. None: none.
        higher_is_better: of `best`.
        asynchronous: training goes on while the file is written, from a copy in main memory.

    Raises:
        UserError: a number below 1.
    """

    def __init__(
        self,
        run_dir: str,
        every: int,
        keep: int = 2,
        keep_every: int | None = None,
        best: str | None = None,
        higher_is_better: bool = False,
        asynchronous: bool = False,
    ) -> None:
        if min(every, keep, 1 if keep_every is None else keep_every) < 1:
            raise UserError(
                f"callbacks.checkpoint: every={every}, keep={keep}, keep_every={keep_every}; all must be at least 1"
            )
        self.run_dir, self.folder = Path(run_dir), Path(run_dir) / "checkpoints"
        self.every, self.keep, self.keep_every = every, keep, keep_every
        self.best, self.sign, self.asynchronous = best, -1.0 if higher_is_better else 1.0, asynchronous
        self.writer = ThreadPoolExecutor(1)  # the interpreter waits for it before it ends
        self.writing: Future[None] | None = None  # of step `saving`, on rank 0
        self.saving = 0
        self.step = 0  # the last one seen: with accumulation, several batches share a step
        self.ended_a_step = False  # the last batch
        self.stopped = False  # by a signal, after the step that was just saved
        self.hosts: Any = None  # a group in which ranks talk without waiting for their GPUs; None: the default

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu":
            self.hosts = distributed.new_group(backend="gloo")
        self._agree(trainer)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.partial"):
                path.unlink()
            for path in by_step(self.run_dir):
                if step_of(path) > self.step:  # passed over: out of the way of those to come
                    path.with_suffix(".json").unlink(missing_ok=True)
                    path.rename(path.with_suffix(".damaged"))
            best = best_of(self.run_dir)
            if best and best["step"] > self.step:
                (self.folder / "best.json").unlink()
        if self._any_rank(bool(interrupt.asked())):
            self._leave(trainer, "before the first step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ended_a_step = trainer.global_step != self.step
        if not self.ended_a_step:
            return
        self.step = trainer.global_step
        if self.step == trainer.max_steps:
            return  # the last one waits for the last validation, whose latent statistics belong in it
        self.stopped = self._any_rank(bool(interrupt.asked()))
        if self.stopped or self.step % self.every == 0:
            self.save(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.stopped:  # not before: the step was still to be logged
            self._leave(trainer, f"after step {self.step}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.best or not self.ended_a_step:
            return
        self.wait(trainer)  # the best so far may be on its way to the disk
        value, better = trainer.callback_metrics.get(self.best), False
        if self._any_rank(trainer.is_global_zero and value is None):  # the first rank alone has every value
            names = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"callbacks.checkpoint.best={self.best} is not logged; there are: {names}")
        if trainer.is_global_zero and value is not None and math.isfinite(value):
            before = best_of(self.run_dir)
            better = before is None or self.sign * float(value) < self.sign * before["value"]
        if self._any_rank(better):
            self.save(trainer, None if value is None else float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self.wait(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _refuse_newer(checkpoint)

    def save(self, trainer: Trainer, best: float | None = None) -> None:
        """All ranks together. best: the value that makes it the best one so far.

        Raises:
            UserError: it could not be written, or an asynchronous one before it, and there is no other.
        """
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # FSDP gathers here
        self.wait(trainer)  # after it: the watchdog knows by now that this is saving
        if trainer.is_global_zero:
            seen = getattr(trainer.datamodule, "samples_seen", None)
            state = {**(_copy(checkpoint) if self.asynchronous else checkpoint), "format": FORMAT}
            self.saving, self.writing = trainer.global_step, self.writer.submit(self._write, state, seen, best)
        if self.stopped or not self.asynchronous:
            self.wait(trainer)

    def wait(self, trainer: Trainer) -> None:
        """Until the last checkpoint is written. All ranks together.

        Raises:
            UserError: see save.
        """
        writing, self.writing = self.writing, None
        trouble, other = "", False
        if writing is not None:
            try:
                writing.result()
            except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
                trouble, other = f"{type(error).__name__}: {error}".splitlines()[0], bool(newest(self.run_dir))
            if not trouble:
                self._tell(trainer.loggers)
        if self._any_rank(bool(trouble) and not other):
            raise UserError(f"the first checkpoint could not be written to {self.folder} ({trouble or 'on rank 0'})")
        if trouble:
            warnings.warn(f"step {self.saving} was not saved ({trouble}); {newest(self.run_dir)} stays", stacklevel=2)

    def _tell(self, loggers: Sequence[Logger]) -> None:
        for logger in loggers:
            try:
                logger.after_save_checkpoint(self)
            except Exception as error:  # whatever a server makes of it, training goes on
                warnings.warn(f"{type(logger).__name__} did not note step {self.saving} ({error})", stacklevel=3)

    def _write(self, checkpoint: dict[str, Any], samples_seen: int | None, best: float | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        need, free = _bytes(checkpoint), shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(errno.ENOSPC, f"{need / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        path = self.folder / f"step_{checkpoint['global_step']:08d}.ckpt"
        aside, manifest = path.with_suffix(".partial"), path.with_suffix(".json")
        try:
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            content = {
                "step": checkpoint["global_step"],
                "samples_seen": samples_seen,
                "files": {path.name: {"bytes": aside.stat().st_size, "sha256": sha256(aside)}},
                "versions": {"format": FORMAT, "python": platform.python_version()}
                | {name: version(name) for name in ("ldm", "torch", "pytorch-lightning")},
            }
            manifest.unlink(missing_ok=True)  # of the same step, before a kill
            aside.rename(path)
            aside.write_text(json.dumps(content, indent=1) + "\n")
            aside.rename(manifest)
            if best is not None:
                aside.write_text(json.dumps({"step": content["step"], "name": self.best, "value": best}) + "\n")
                aside.rename(self.folder / "best.json")
        finally:
            aside.unlink(missing_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)  # the renames
        os.close(folder)
        kept = best_of(self.run_dir)
        for old in by_step(self.run_dir)[: -self.keep]:
            forever = self.keep_every is not None and step_of(old) % self.keep_every == 0
            if not forever and not (kept and kept["step"] == step_of(old)):
                old.unlink()
                old.with_suffix(".json").unlink(missing_ok=True)

    def _agree(self, trainer: Trainer) -> None:
        """Each rank has looked for the newest checkpoint itself; a file system may show them different ones."""
        steps = torch.tensor([self.step, -self.step])
        if trainer.world_size > 1:
            distributed.all_reduce(steps, distributed.ReduceOp.MAX, group=self.hosts)
        last, first = steps[0].item(), -steps[1].item()
        if first != last:
            raise UserError(
                f"ranks would go on from different steps, {first} to {last}: {self.folder} does not look the same to all of "
                "them; wait until its file system has caught up, and give the same command again"
            )

    def _any_rank(self, flag: bool) -> bool:
        """Whether any rank says so; all must ask together."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return flag
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self.hosts)
        return bool(flags)

    def _leave(self, trainer: Trainer, when: str) -> None:
        self.wait(trainer)
        why = interrupt.asked() or "another rank's signal"
        say(f"stopped by {why} {when}: the same command goes on with {newest(self.run_dir) or 'nothing yet'}")
        # of the others, a code other than 0 would have Lightning's launcher kill the first
        raise SystemExit(interrupt.REQUEUE if trainer.is_global_zero else 0)


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"cannot read the checkpoint {path} ({type(error).__name__}); delete it to use the one before"
        ) from error


def _refuse_newer(checkpoint: dict[str, Any]) -> None:
    written = checkpoint.get("format", 1)
    if written > FORMAT:
        raise UserError(
            f"a newer ldm wrote this checkpoint: format {written}, this one reads up to {FORMAT}; upgrade ldm"
        )


def _copy(state: Any) -> Any:
    """The same plain data with every tensor in main memory of its own, so that training may go on with the originals."""
    return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, state)


def _bytes(node: Any) -> int:
    """Of all tensors in plain data."""
    if isinstance(node, Tensor):
        return node.nbytes
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    return sum(map(_bytes, children))
