from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.errors import UserError
from ldm.training.checkpointing import Checkpoint, newest, read


class FakeTrainer(SimpleNamespace):
    """Saves its step, and looks at the folder while it does."""

    global_step = 0
    max_steps = 100
    is_global_zero = True

    def save_checkpoint(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.complete_while_saving = [p.name for p in path.parent.glob("*.ckpt")]
        torch.save({"global_step": self.global_step, "weights": torch.ones(1000)}, path)


def train(callback: Checkpoint, trainer: FakeTrainer, steps: int, batches_per_step: int = 1) -> None:
    callback.on_train_start(trainer, None)
    for _ in range(steps * batches_per_step):
        trainer.batches = getattr(trainer, "batches", 0) + 1
        trainer.global_step = trainer.batches // batches_per_step
        callback.on_train_batch_end(trainer, None)


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_every_n_steps_and_at_the_end_keeping_the_last(tmp_path: Path):
    callback, trainer = Checkpoint(str(tmp_path), every=2, keep=2), FakeTrainer()
    train(callback, trainer, 7)
    assert names(tmp_path) == ["step_00000004.ckpt", "step_00000006.ckpt"]
    callback.on_train_end(trainer, None)
    assert names(tmp_path) == ["step_00000006.ckpt", "step_00000007.ckpt"]
    assert newest(tmp_path).name == "step_00000007.ckpt"
    assert read(newest(tmp_path))["global_step"] == 7


def test_a_file_is_complete_or_invisible(tmp_path: Path):
    callback, trainer = Checkpoint(str(tmp_path), every=1, keep=1), FakeTrainer()
    train(callback, trainer, 3)
    assert trainer.complete_while_saving == ["step_00000002.ckpt"]  # the one before stands until the new one does
    assert names(tmp_path) == ["step_00000003.ckpt"]  # nothing partial is left
    (tmp_path / "checkpoints" / "step_00000009.partial").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step_9.ckpt").write_bytes(b"not ours")
    assert newest(tmp_path).name == "step_00000003.ckpt"


@pytest.mark.parametrize("begin", [0, 4])
def test_never_within_an_accumulated_step(tmp_path: Path, begin: int):
    """Also after a resume at a step that `every` divides."""
    saved = []
    callback, trainer = Checkpoint(str(tmp_path), every=2), FakeTrainer(batches=3 * begin, global_step=begin)
    trainer.save_checkpoint = lambda path: (saved.append(trainer.batches), path.parent.mkdir(exist_ok=True),
                                            path.write_bytes(b""))  # fmt: skip
    train(callback, trainer, 4, batches_per_step=3)
    assert saved == [3 * begin + 6, 3 * begin + 12]


def test_the_last_one_is_written_after_the_last_validation(tmp_path: Path):
    """Or a kill during that validation would leave a complete run with the latent statistics of an earlier one."""
    callback, trainer = Checkpoint(str(tmp_path), every=2), FakeTrainer(max_steps=4)
    train(callback, trainer, 4)
    assert names(tmp_path) == ["step_00000002.ckpt"]
    callback.on_train_end(trainer, None)
    assert names(tmp_path) == ["step_00000002.ckpt", "step_00000004.ckpt"]


def test_newest_of_nothing(tmp_path: Path):
    assert newest(tmp_path) is None


def test_a_damaged_file_is_named(tmp_path: Path):
    path = tmp_path / "step_00000001.ckpt"
    torch.save({"weights": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*step_00000001\.ckpt"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="delete it to use the one before"):
        read(path)


class Gadget:
    """Pickled code: makes a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickled_code_is_refused(tmp_path: Path):
    torch.save({"weights": Gadget(tmp_path / "ran")}, tmp_path / "step_00000001.ckpt")
    with pytest.raises(UserError, match="UnpicklingError"):
        read(tmp_path / "step_00000001.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("numbers", [{"every": 0}, {"every": 5, "keep": 0}])
def test_numbers_below_one_are_refused(tmp_path: Path, numbers: dict[str, int]):
    with pytest.raises(UserError, match="both must be at least 1"):
        Checkpoint(str(tmp_path), **numbers)
