"""What a stopped rank and a hanging one look like; test_survival stops a real one (R8)."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.errors import UserError
from ldm.training import watchdog
from ldm.training.watchdog import Mark, Watchdog


def dog(tmp_path: Path, marks: list[Mark], ages: list[float], rank: int = 0) -> Watchdog:
    """Of a rank, among files of these marks that were last written so many seconds ago."""
    callback = Watchdog(str(tmp_path), timeout=100)
    callback.rank, callback.world = rank, len(marks)
    callback.folder.mkdir(parents=True)
    now = time.time()
    for i, (mark, age) in enumerate(zip(marks, ages, strict=True)):
        (callback.folder / f"{i}.json").write_text(json.dumps(mark._asdict()))
        os.utime(callback.folder / f"{i}.json", (now - age, now - age))
    return callback


def test_who_is_late(tmp_path: Path):
    step, data = Mark(8, 3, watchdog.WATCHED[1], 0.0), Mark(7, 3, watchdog.WATCHED[0], 0.0)
    silent = dog(tmp_path / "a", [step, step, step], [1, 105, 4])
    assert silent._late() == {1: "in the training step of step 4, silent for 104 s: dead or stopped"}
    hanging = dog(tmp_path / "b", [step, step, data], [1, 5, 9])
    assert hanging._late() == {2: "waiting for data of step 4, behind the others"}
    assert dog(tmp_path / "c", [step, step], [1, 2])._late() == {}


@pytest.mark.parametrize(("rank", "says"), [(0, False), (1, True), (2, False)])
def test_one_line_by_the_first_rank_that_lives_and_all_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, says: bool
):
    step, data = Mark(8, 3, watchdog.WATCHED[1], 0.0), Mark(7, 3, watchdog.WATCHED[0], 0.0)
    callback = dog(tmp_path / "x", [data, step, step], [1, 1, 1], rank)
    callback.timeout, callback.mark = 0.1, [data, step, step][rank]
    monkeypatch.setattr(callback, "_write", lambda: None)

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        callback._watch()
    assert ended.value.code == 70
    told = capsys.readouterr().err
    assert told == (
        "error: step 4 has stood still for 0.1 s: rank 0 is waiting for data of step 4, behind the others. "
        "The same command goes on\n" if says else ""
    )  # fmt: skip


def test_validation_saving_and_the_first_steps_are_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    callback = Watchdog(str(tmp_path), timeout=0.2)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"it ended the process with {code}"))
    trainer = SimpleNamespace(global_step=5, global_rank=0, world_size=2)
    callback.on_train_start(trainer, None)
    callback.on_train_batch_start(trainer, None, None, 0)
    time.sleep(0.4)
    callback.on_train_batch_end(trainer)
    trainer.global_step, trainer.callbacks = 6, [callback]
    callback.on_train_batch_start(trainer, None, None, 1)  # which compiles, where the first was counted
    time.sleep(0.4)
    with watchdog.unwatched(trainer, "saving"):
        time.sleep(0.4)
    trainer.global_step = 7
    callback.on_train_batch_start(trainer, None, None, 2)
    callback.on_train_batch_end(trainer)
    for hook in (
        lambda: callback.on_validation_start(trainer, None),
        lambda: callback.on_save_checkpoint(trainer, None, {}),
    ):
        hook()
        time.sleep(0.4)
        callback.on_validation_end(trainer, None)
    callback.on_train_end(trainer, None)
    phases = json.loads((tmp_path / "ranks" / "0.json").read_text())
    assert phases["step"] == 7


def test_one_rank_alone_is_not_watched(tmp_path: Path):
    Watchdog(str(tmp_path)).on_train_start(SimpleNamespace(global_step=0, global_rank=0, world_size=1), None)
    assert list(tmp_path.iterdir()) == []


def test_a_timeout_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"callbacks.watchdog.timeout=0; give a number of seconds above 0"):
        Watchdog(str(tmp_path), timeout=0)
