"""USR1, USR2 and TERM: at any moment, the run is saved at the end of its step and left with exit code 75."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_end_to_end import assert_same_checkpoint
from tiny import here
from trials import TWO, arguments, finish, last_step, shards, start_ranks, wait_for

from ldm.training import checkpointing, interrupt

STEPS = 250


@pytest.fixture
def harmless() -> Iterator[None]:
    """A signal that comes before the run listens, or after, does nothing to pytest."""
    before = {each: signal.signal(each, lambda *_: None) for each in interrupt.SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def test_the_first_signal_is_noted(harmless: None):
    interrupt.listen()
    assert interrupt.asked() == ""
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.asked() == "SIGUSR2"
    interrupt.listen()
    assert interrupt.asked() == ""


def test_a_signal_that_comes_while_a_rank_leaves_does_not_change_its_exit_code():
    """SLURM signals one rank after another; the first to hear of it stops them all."""
    code = "import atexit, os, signal\nfrom ldm.training import interrupt\n"
    code += (
        "interrupt.listen()\natexit.register(os.kill, os.getpid(), signal.SIGUSR1)\nraise SystemExit(interrupt.REQUEUE)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 75


def test_importing_it_does_not_import_torch():
    code = "import sys, ldm.training.interrupt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lightning_registers_no_handler_of_its_own(harmless: None, monkeypatch: pytest.MonkeyPatch):
    """Also under SLURM, where it would save inside the handler."""
    import pytorch_lightning as pl

    for name, value in {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0",
                        "JOB_NAME": "ldm", "NNODES": "1", "JOB_ID": "7"}.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    seen = []

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            seen.append([signal.getsignal(each) for each in interrupt.SIGNALS])
            return self.weight * batch.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    own = [signal.getsignal(each) for each in interrupt.SIGNALS]
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "logger": False, "enable_checkpointing": False,
               "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    for keep_out in (False, True):
        trainer = pl.Trainer(**options)
        if keep_out:
            interrupt.keep_lightning_out(trainer)
        trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(2, 1)))
    assert own not in seen[:1]  # or this test tells nothing
    assert seen[1:] == [own]


def test_a_signal_before_the_first_step_leaves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(interrupt, "_received", [signal.SIGTERM])
    callback = checkpointing.Checkpoint(str(tmp_path), every=5)
    with pytest.raises(SystemExit) as left:
        callback.on_train_start(SimpleNamespace(global_step=0, world_size=1, is_global_zero=True), None)
    assert left.value.code == 75
    assert "stopped by SIGTERM before the first step" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("harmless")
def test_signals_at_random_moments(tmp_path: Path):
    """In this process, whose imports are done: at least twenty that end it. Each start goes on where the last one stopped."""
    data = shards(tmp_path / "shards")
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    assert here("train.py", *arguments(straight, data, STEPS, "callbacks.checkpoint.every=1000")) == 0
    draw, reached, code = random.Random(1), [0], 75
    over = threading.Event()

    def shoot(number: signal.Signals, step: int, delay: float) -> None:
        """After the delay once the log has come to this step; on a fast machine, before it gets far: twenty shall fit in."""
        begun, far = 0.0, reached[-1] + 10
        while not over.wait(0.002):
            at = last_step(run_dir)
            begun = begun or (at >= step and time.monotonic())
            if at >= far or (begun and time.monotonic() - begun >= delay):
                return os.kill(os.getpid(), number)

    stops = 0
    while code == 75:
        over.clear()
        step, delay = (
            (0, draw.uniform(0.0, 1.5)) if stops % 3 == 2 else (reached[-1] + draw.randint(1, 9), draw.uniform(0, 0.03))
        )
        gun = threading.Thread(target=shoot, args=(draw.choice(interrupt.SIGNALS), step, delay))
        if stops < 22:
            gun.start()
        code = here("train.py", *arguments(run_dir, data, STEPS, "callbacks.checkpoint.every=1000"))
        over.set()
        if gun.ident:
            gun.join()
        stops += code == 75
        newest = checkpointing.newest(run_dir)
        if newest is not None:
            assert checkpointing.find_damage(newest) == ""
            reached.append(checkpointing.step_of(newest))
            assert last_step(run_dir) == reached[-1]
    assert code == 0
    assert stops >= 20
    assert reached == sorted(reached)
    assert len(set(reached)) > 10  # not all of them before the first step
    assert_same_checkpoint(run_dir, straight)
    assert (run_dir / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()


def test_a_signal_to_one_rank_of_two_stops_both_after_the_same_step(tmp_path: Path):
    data = shards(tmp_path / "shards")
    words = arguments(tmp_path / "run", data, 100_000, *TWO)
    ranks = start_ranks(words, tmp_path / "log")
    wait_for(lambda: last_step(tmp_path / "run") > 5)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [finish(each, 20) for each in ranks] == [75, 0]
    path = checkpointing.newest(tmp_path / "run")
    assert checkpointing.find_damage(path) == ""
    assert checkpointing.read(path)["ShardDataModule"]["samples_seen"] == 4 * checkpointing.step_of(path)
