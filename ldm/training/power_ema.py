"""Power-function averages, and any other length out of their snapshots (EDM2: Karras et al. 2024, section 3, appendix C).

t counts optimizer steps; a length is sigma_rel, the standard deviation of an average's weights over the length of training.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import UserError
from ldm.files import aside
from ldm.training.ema import Average, cut, whole
from ldm.training.watchdog import unwatched

WIDEST = 0.28  # sigma_rel of gamma = 0, the plain mean, is 0.2887
_STORED = ("float32", "float16", "bfloat16")


def exponent(length: float) -> float:
    """sigma_rel -> gamma (algorithm 2): sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        UserError: no power function is that wide.
    """
    if not 0 < length <= WIDEST:
        raise UserError(f"an average's length is {length}; give one in (0, {WIDEST}], such as 0.05")
    square = length**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


class PowerEMA(Average):
    """Averages with beta(t) = (1 - 1/t)^(gamma + 1) (section 3.1), and snapshots of them in run_dir/ema/step_<n>.safetensors.

    Args:
        run_dir: the run's directory.
        lengths: of the averages, in (0, 0.28]; two are enough to reconstruct others.
        every: optimizer steps between snapshots; the last step has one too. Reconstruction is as good as they are many.
        dtype: of snapshots: float32, float16 or bfloat16.

    In a checkpoint: `power_ema` = {"updates": n, "weights": {length: {name: fp32 tensor}}}.

    Raises:
        UserError: a number out of range.
    """

    def __init__(self, run_dir: str, lengths: Sequence[float], every: int, dtype: str = "float16") -> None:
        super().__init__()
        if every < 1 or dtype not in _STORED or not lengths:
            raise UserError(
                f"callbacks.power_ema: lengths={list(lengths)}, every={every}, dtype={dtype}; give at least one length, "
                f"every >= 1, and a dtype of {', '.join(_STORED)}"
            )
        self.folder, self.every, self.dtype = Path(run_dir) / "ema", every, getattr(torch, dtype)
        self.exponents = {str(float(length)): exponent(length) for length in lengths}
        self.averages: dict[str, dict[str, Tensor]] = {length: {} for length in self.exponents}
        self.stored = -1  # step of the last snapshot

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.averages = {length: self._begun(average) for length, average in self.averages.items()}
        self._store(trainer, pl_module)  # a kill may have come between the checkpoint and its snapshot

    def _update(self, current: list[Tensor]) -> None:
        t = self.updates + 1
        for length, average in self.averages.items():
            beta = (1 - 1 / t) ** (self.exponents[length] + 1)
            torch._foreach_lerp_(list(average.values()), current, 1 - beta)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)
        self._store(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._store(trainer, pl_module, last=True)

    def _store(self, trainer: Trainer, module: LightningModule, last: bool = False) -> None:
        if not self.updates or self.step == self.stored or (self.step % self.every and not last):
            return
        self.stored = self.step
        with unwatched(trainer, "saving"):
            tensors = {
                f"{length}/{name}": value.to(self.dtype).cpu().contiguous()
                for length, average in self.averages.items()
                for name, value in whole(module, average).items()
                if trainer.is_global_zero
            }
            if trainer.is_global_zero:
                about = {"updates": str(self.updates), "lengths": json.dumps([*self.averages])}
                write(self.folder / f"step_{self.step:08d}.safetensors", tensors, about)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_train_batch_end(trainer, pl_module)
        averages = {length: whole(pl_module, average) for length, average in self.averages.items()}
        checkpoint["power_ema"] = {"updates": self.updates, "weights": averages}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("power_ema", {"weights": {}})
        if saved["weights"].keys() != self.averages.keys():
            before = ", ".join(saved["weights"]) or "none"
            raise UserError(
                f"the checkpoint has power-function averages of lengths: {before}; callbacks.power_ema.lengths are "
                f"{', '.join(self.averages)}: an average cannot begin in the middle of a run"
            )
        self.updates = saved["updates"]
        self.averages = {length: cut(pl_module, average) for length, average in saved["weights"].items()}


def write(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """A safetensors file, whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial:
        save_file(tensors, partial, {"format": "pt"} | about)
        with partial.open("rb") as file:
            os.fsync(file.fileno())


def product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
    """Inner product of the weights over training of two power-function averages (algorithm 3); arrays or numbers."""
    ratio, late = t_a / t_b, np.maximum(t_a, t_b)
    bend = ratio ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * bend / ((gamma_a + gamma_b + 1) * late)


def solve(t: np.ndarray, gamma: np.ndarray, t_wanted: float, gamma_wanted: float) -> tuple[np.ndarray, float]:
    """The coefficients (K,) of averages (t (K,), gamma (K,)) that come nearest to the one wanted (algorithm 3).

    Also returns how far they stay from it: the distance of the weights over training, relative to the wanted one's.
    """
    column, row = (t[:, None], gamma[:, None]), (t[None], gamma[None])
    gram, projection = product(*column, *row), product(t, gamma, t_wanted, gamma_wanted)
    x = np.linalg.solve(gram, projection)
    norm = product(np.float64(t_wanted), gamma_wanted, np.float64(t_wanted), gamma_wanted)
    return x, float(np.sqrt(max(0.0, 1 - x @ projection / norm)))


class Reconstruction(NamedTuple):
    """weights: {name: fp32 tensor}; step: that they are from; error: see `solve`; sources: how many averages they are made of."""

    weights: dict[str, Tensor]
    step: int
    error: float
    sources: int


def _snapshots(run: str | Path) -> dict[int, Path]:
    """By step."""
    return {
        int(path.stem.removeprefix("step_")): path for path in sorted((Path(run) / "ema").glob("step_*.safetensors"))
    }


def reconstruct(run: str | Path, length: float, at: int | None = None) -> Reconstruction:
    """The average of this length at a step of a run, out of the snapshots up to there.

    Args:
        at: a step that has a snapshot; None: the last.

    Raises:
        UserError: there is no snapshot of that step.
    """
    gamma = exponent(length)
    paths = _snapshots(run)
    step = max(paths, default=None) if at is None else at
    if step not in paths:
        there = ", ".join(map(str, paths)) or "none: train with 'callbacks=[latent_diffusion,power_ema]'"
        raise UserError(
            f"{run} has no snapshot of its averages{'' if at is None else f' at step {at}'}; there are: {there}"
        )
    sources = []  # (path, length, t, gamma)
    for path in (path for each, path in paths.items() if each <= step):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        sources += [
            (path, each, float(about["updates"]), exponent(float(each))) for each in json.loads(about["lengths"])
        ]
    t, gammas = (np.array([source[i] for source in sources]) for i in (2, 3))
    coefficients, error = solve(t, gammas, t[-1], gamma)
    weights: dict[str, Tensor] = {}
    for (path, each, _, _), coefficient in zip(sources, coefficients.tolist(), strict=True):
        with safe_open(path, "pt") as file:
            for key in (key for key in file.keys() if key.startswith(f"{each}/")):  # noqa: SIM118
                value, name = file.get_tensor(key).float(), key.removeprefix(f"{each}/")
                weights[name] = weights.get(name, torch.zeros_like(value)).add_(value, alpha=coefficient)
    return Reconstruction(weights, step, error, len(sources))


def save(run: Path, length: float, at: int | None, out: Path | None) -> tuple[Path, Reconstruction]:
    """Writes a reconstruction for `evaluate.py checkpoint=RUN ema=FILE`. Returns the file."""
    made = reconstruct(run, length, at)
    path = out or run / "ema" / f"length_{length:g}_step_{made.step:08d}.safetensors"
    write(path, made.weights, {"step": str(made.step), "length": str(length)})
    return path, made


def chosen(run: str | Path, which: float | str, step: int) -> tuple[dict[str, Tensor], int]:
    """The averaged weights that evaluation asks for, and the step they are from.

    Args:
        which: a length, reconstructed from the last snapshot up to `step`; or a file that `save` wrote.

    Raises:
        UserError: neither, or there are no snapshots.
    """
    if isinstance(which, str):
        if not Path(which).is_file():
            raise UserError(f"ema={which} is neither null, raw, a length such as 0.05, nor a file that `ldm ema` wrote")
        with safe_open(which, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, int(file.metadata()["step"])  # noqa: SIM118
    made = reconstruct(run, which, max((each for each in _snapshots(run) if each <= step), default=None))
    return made.weights, made.step
