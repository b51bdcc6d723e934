import hashlib
import json
import resource
import shutil
import threading
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.errors import UserError
from ldm.training import interrupt
from ldm.training.checkpointing import Checkpoint, best_of, by_step, find_damage, newest, read, resume_from, step_of


class FakeTrainer(SimpleNamespace):
    """Its state is its step, and it looks at the folder while it is saved."""

    global_step = 0
    max_steps = 100
    world_size = 1
    is_global_zero = True
    datamodule = None
    loggers = ()
    sanity_checking = False
    weight = 1.0
    folder: Path

    @property
    def _checkpoint_connector(self) -> Any:
        return SimpleNamespace(dump_checkpoint=self.dump)

    def dump(self, weights_only: bool) -> dict[str, Any]:
        assert not weights_only
        self.complete_while_saving = names(self.folder, "*.ckpt")
        return {"global_step": self.global_step, "state_dict": {"weight": torch.full((1000,), self.weight)}}


def train(callback: Checkpoint, trainer: FakeTrainer, steps: int, batches_per_step: int = 1) -> None:
    trainer.folder = callback.run_dir
    callback.on_train_start(trainer, None)
    for _ in range(steps * batches_per_step):
        trainer.batches = getattr(trainer, "batches", 0) + 1
        trainer.global_step = trainer.batches // batches_per_step
        callback.on_train_batch_end(trainer, None)


def names(run_dir: Path, which: str = "*") -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").glob(which))


def made(run_dir: Path, *steps: int, **options: Any) -> list[Path]:
    """Checkpoints after these steps."""
    callback, trainer = Checkpoint(str(run_dir), every=1, keep=99), FakeTrainer(folder=run_dir, **options)
    for step in steps:
        trainer.global_step = step
        callback.save(trainer)
    return by_step(run_dir)


def test_every_n_steps_and_at_the_end_keeping_the_last(tmp_path: Path):
    callback, trainer = Checkpoint(str(tmp_path), every=2, keep=2), FakeTrainer()
    train(callback, trainer, 7)
    assert names(tmp_path, "*.ckpt") == ["step_00000004.ckpt", "step_00000006.ckpt"]
    callback.on_train_end(trainer, None)
    assert names(tmp_path) == [
        "step_00000006.ckpt", "step_00000006.json", "step_00000007.ckpt", "step_00000007.json",
    ]  # fmt: skip
    assert newest(tmp_path).name == "step_00000007.ckpt"
    assert read(newest(tmp_path))["global_step"] == step_of(newest(tmp_path)) == 7


def test_every_n_are_kept_forever(tmp_path: Path):
    train(Checkpoint(str(tmp_path), every=1, keep=2, keep_every=4), FakeTrainer(), 11)
    assert names(tmp_path, "*.ckpt") == [f"step_{n:08d}.ckpt" for n in (4, 8, 10, 11)]
    assert names(tmp_path, "*.json") == [f"step_{n:08d}.json" for n in (4, 8, 10, 11)]


def test_the_manifest(tmp_path: Path):
    (path,) = made(tmp_path, 3, datamodule=SimpleNamespace(samples_seen=24))
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert (manifest["step"], manifest["samples_seen"]) == (3, 24)
    data = path.read_bytes()
    assert manifest["files"] == {path.name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert manifest["versions"]["torch"] == version("torch")
    assert manifest["versions"]["format"] == read(path)["format"]


def test_a_file_is_complete_or_invisible(tmp_path: Path):
    callback, trainer = Checkpoint(str(tmp_path), every=1, keep=1), FakeTrainer()
    train(callback, trainer, 3)
    assert trainer.complete_while_saving == ["step_00000002.ckpt"]  # the one before stands until the new one does
    assert names(tmp_path) == ["step_00000003.ckpt", "step_00000003.json"]  # nothing partial is left
    (tmp_path / "checkpoints" / "step_00000009.partial").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step_9.ckpt").write_bytes(b"not ours")
    assert newest(tmp_path).name == "step_00000003.ckpt"


@pytest.mark.parametrize("begin", [0, 4])
def test_never_within_an_accumulated_step(tmp_path: Path, begin: int):
    """Also after a resume at a step that `every` divides."""
    saved = []
    callback, trainer = Checkpoint(str(tmp_path), every=2), FakeTrainer(batches=3 * begin, global_step=begin)
    callback.save = lambda trainer: saved.append(trainer.batches)
    train(callback, trainer, 4, batches_per_step=3)
    assert saved == [3 * begin + 6, 3 * begin + 12]


def test_the_last_one_is_written_after_the_last_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Or a kill during that validation would leave a complete run with the latent statistics of an earlier one; a signal
    does not leave it out either.
    """
    callback, trainer = Checkpoint(str(tmp_path), every=2), FakeTrainer(max_steps=4)
    train(callback, trainer, 3)
    monkeypatch.setattr(interrupt, "_received", [10])
    trainer.global_step = 4
    callback.on_train_batch_end(trainer, None)
    assert names(tmp_path, "*.ckpt") == ["step_00000002.ckpt"]
    callback.on_train_end(trainer, None)
    assert names(tmp_path, "*.ckpt") == ["step_00000002.ckpt", "step_00000004.ckpt"]


@pytest.mark.parametrize(("rank", "code"), [(0, 75), (1, 0)])
def test_a_signal_saves_at_the_end_of_the_step_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, code: int
):
    callback, trainer = Checkpoint(str(tmp_path), every=100), FakeTrainer(is_global_zero=rank == 0)
    train(callback, trainer, 6, batches_per_step=2)
    monkeypatch.setattr(interrupt, "_received", [interrupt.signal.SIGUSR2])
    trainer.batches += 1
    callback.on_train_batch_end(trainer, None)  # in the middle of a step
    assert names(tmp_path) == []
    callback.on_train_batch_start(trainer, None)
    trainer.global_step = 7
    callback.on_train_batch_end(trainer, None)
    with pytest.raises(SystemExit) as left:  # after the step was logged: before a validation, or the next step
        callback.on_validation_start(trainer, None) if rank else callback.on_train_batch_start(trainer, None)
    assert left.value.code == code
    assert "stopped by SIGUSR2 after step 7: the same command goes on" in capsys.readouterr().out
    assert names(tmp_path, "*.ckpt") == (["step_00000007.ckpt"] if rank == 0 else [])


def test_newest_of_nothing(tmp_path: Path):
    assert newest(tmp_path) is None
    assert resume_from(tmp_path, "auto") is None
    assert resume_from(tmp_path, "never") is None
    with pytest.raises(UserError, match=r"resume=must, but .* has no checkpoint"):
        resume_from(tmp_path, "must")


def test_what_to_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = made(tmp_path, 1, 2, 3)
    assert resume_from(tmp_path, "auto") == resume_from(tmp_path, "must") == paths[2]
    with pytest.raises(UserError, match=r"resume=never, but .*step_00000003.ckpt is there"):
        resume_from(tmp_path, "never")
    with pytest.raises(UserError, match="resume=latest; give auto, must"):
        resume_from(tmp_path, "latest")
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    assert capsys.readouterr().out == ""
    assert resume_from(tmp_path, "auto") == paths[0]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [str(paths[2]), str(paths[1])]
    paths[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: delete that folder to begin at step 0"):
        resume_from(tmp_path, "auto")


def test_what_was_passed_over_is_put_out_of_the_way(tmp_path: Path):
    """Or with `keep` = 1 the next save would delete itself, and keep the damaged one of a later step."""
    paths = made(tmp_path, 2, 4, 6)
    (tmp_path / "checkpoints" / "step_00000006.partial").touch()
    for path in paths[1:]:
        path.write_bytes(b"")
    train(Checkpoint(str(tmp_path), every=1, keep=1), FakeTrainer(global_step=2, batches=2), 1)
    assert names(tmp_path) == [
        "step_00000003.ckpt", "step_00000003.json", "step_00000004.damaged", "step_00000006.damaged",
    ]  # fmt: skip


@pytest.mark.parametrize("manifest", ["", "{}", "{", '{"files": []}', None])
def test_without_a_manifest_that_says_something_the_file_is_read(tmp_path: Path, manifest: str | None):
    (path,) = made(tmp_path, 1)
    path.with_suffix(".json").unlink()
    if manifest is not None:
        path.with_suffix(".json").write_text(manifest)
    assert find_damage(path) == ""
    torch.save({"weights": torch.ones(3)}, path)
    assert find_damage(path) == "it is no checkpoint"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot read" in find_damage(path)


def test_a_step_saved_again_and_killed_before_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The manifest of before would call it damaged."""
    (path,) = made(tmp_path, 3)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, 3, datamodule=SimpleNamespace(samples_seen=1), weight=2.0)
    assert read(path)["state_dict"]["weight"][0] == 2
    assert find_damage(path) == ""


def test_a_damaged_file_is_named(tmp_path: Path):
    path = tmp_path / "step_00000001.ckpt"
    torch.save({"weights": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*step_00000001\.ckpt"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="delete it to use the one before"):
        read(path)


def test_a_newer_format_is_refused(tmp_path: Path):
    path = tmp_path / "step_00000001.ckpt"
    torch.save({"state_dict": {}, "format": 3}, path)
    with pytest.raises(UserError, match=r"a newer ldm wrote this checkpoint: format 3, this one reads up to 2"):
        read(path)
    with pytest.raises(UserError, match="upgrade ldm"):
        Checkpoint(str(tmp_path), every=1).on_load_checkpoint(None, None, {"format": 3})


def test_no_room_is_told_before_and_a_full_disk_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first is an error, a later one a warning: the run goes on, and the one before stays."""
    callback, trainer = Checkpoint(str(tmp_path), every=1), FakeTrainer(folder=tmp_path, global_step=1)
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3999))  # 1000 floats are 4000
        with pytest.raises(UserError, match=r"the first checkpoint could not be written to .*MB are needed"):
            callback.save(trainer)
    callback.save(trainer)
    trainer.global_step = 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # as a full disk does, a write fails in the middle
    try:
        with pytest.warns(UserWarning, match=r"was not saved \(.*\); .*step_00000001.ckpt stays"):
            callback.save(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_00000001.ckpt", "step_00000001.json"]
    callback.save(trainer)
    assert find_damage(newest(tmp_path)) == ""


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


@pytest.mark.parametrize("numbers", [{"every": 0}, {"every": 5, "keep": 0}, {"every": 5, "keep_every": 0}])
def test_numbers_below_one_are_refused(tmp_path: Path, numbers: dict[str, int]):
    with pytest.raises(UserError, match="all must be at least 1"):
        Checkpoint(str(tmp_path), **numbers)


def test_an_asynchronous_one_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training goes on, and changes the weights, before the file is written."""
    callback, go = Checkpoint(str(tmp_path), every=1, keep=9, asynchronous=True), threading.Event()
    write = Checkpoint._write
    monkeypatch.setattr(Checkpoint, "_write", lambda *args: go.wait(10) and write(*args))
    weight = torch.zeros(1000)
    trainer = FakeTrainer(folder=tmp_path, global_step=1)
    trainer.dump = lambda weights_only: {"global_step": trainer.global_step, "state_dict": {"weight": weight}}
    callback.save(trainer)
    weight += 1
    assert newest(tmp_path) is None
    go.set()
    trainer.global_step = 2
    callback.save(trainer)  # waits for the one before
    assert newest(tmp_path).name == "step_00000001.ckpt" or step_of(newest(tmp_path)) == 2
    weight += 1
    callback.wait(trainer)
    assert [read(path)["state_dict"]["weight"][0].item() for path in by_step(tmp_path)] == [0, 1]
    assert all(find_damage(path) == "" for path in by_step(tmp_path))


def test_an_asynchronous_one_that_fails_is_told_of_at_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    callback, trainer = Checkpoint(str(tmp_path), every=1, asynchronous=True), FakeTrainer(folder=tmp_path)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
    callback.save(trainer)
    with pytest.raises(UserError, match=r"the first checkpoint could not be written to .*0 MB are free"):
        callback.save(trainer)


@pytest.mark.parametrize(("higher", "best"), [(False, 2), (True, 3)])
def test_the_best_is_kept_beside_the_last(tmp_path: Path, higher: bool, best: int):
    callback = Checkpoint(str(tmp_path), every=100, keep=1, best="val/loss", higher_is_better=higher)
    trainer = FakeTrainer(folder=tmp_path)
    callback.on_train_start(trainer, None)
    for step, loss in enumerate([0.5, 0.25, 0.75, 0.5, 0.5], 1):
        trainer.global_step, trainer.callback_metrics = step, {"val/loss": torch.tensor(loss)}
        callback.on_train_batch_end(trainer, None)
        callback.on_validation_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert names(tmp_path, "*.ckpt") == [f"step_{best:08d}.ckpt", "step_00000005.ckpt"]
    assert best_of(tmp_path) == {"step": best, "name": "val/loss", "value": 0.75 if higher else 0.25}


def test_a_best_that_is_not_logged_is_refused(tmp_path: Path):
    callback = Checkpoint(str(tmp_path), every=100, best="val/los")
    trainer = FakeTrainer(folder=tmp_path, callback_metrics={"val/loss": torch.tensor(1.0)})
    train(callback, trainer, 1)
    with pytest.raises(UserError, match=r"callbacks.checkpoint.best=val/los is not logged; there are: val/loss"):
        callback.on_validation_end(trainer, None)


def test_a_validation_within_an_accumulated_step_saves_nothing(tmp_path: Path):
    callback = Checkpoint(str(tmp_path), every=100, best="val/loss")
    trainer = FakeTrainer(folder=tmp_path, callback_metrics={"val/loss": torch.tensor(1.0)})
    train(callback, trainer, 1, batches_per_step=2)
    callback.on_train_batch_end(trainer, None)
    callback.on_validation_end(trainer, None)
    assert names(tmp_path) == []


def test_a_best_that_is_not_finite_is_never_kept(tmp_path: Path):
    callback, trainer = Checkpoint(str(tmp_path), every=100, best="val/loss"), FakeTrainer(folder=tmp_path)
    callback.on_train_start(trainer, None)
    for step, loss in enumerate([float("nan"), 0.5], 1):
        trainer.global_step, trainer.callback_metrics = step, {"val/loss": torch.tensor(loss)}
        callback.on_train_batch_end(trainer, None)
        callback.on_validation_end(trainer, None)
    assert best_of(tmp_path)["step"] == 2


def test_ranks_that_found_different_checkpoints_do_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """This one is at step 5; another, to which the file system shows less, at step 3."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda steps, *_, **__: steps.copy_(torch.tensor([5, -3])))
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"from different steps, 3 to 5: .* does not look the same to all of them"):
        Checkpoint(str(tmp_path), every=1).on_train_start(
            FakeTrainer(folder=tmp_path, global_step=5, world_size=2, strategy=cpu), None
        )
