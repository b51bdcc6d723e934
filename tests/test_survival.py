"""The promises of a run: whatever stops it, the same command ends where the uninterrupted one does.

In this file: R1 two parts, R4 kills, R5 kills inside a save, R6 full disk, R7 damage, R8 a rank that stops, R10 W&B that never
answers, R11 two jobs, R12 requeues, R13 older checkpoints, R14 faults on one rank. Elsewhere: R2 test_end_to_end, R3
test_key_log, R9 test_sources; numbers, signals and SLURM in test_faults, test_interrupt and test_slurm.
"""

import json
import os
import random
import shutil
import signal
import socket
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_end_to_end import assert_same_checkpoint
from tiny import here
from trials import TWO, TWO_SHARDED, arguments, finish, last_step, shards, start, start_ranks, wait_for

from ldm.training import checkpointing, watchdog

STEPS = 100


class Straight(NamedTuple):
    """Shards, and runs of STEPS steps that nothing interrupted: by one rank, by two."""

    shards: str
    one: Path
    two: Path

    def arguments(self, run_dir: Path, *more: str, steps: int = STEPS) -> list[str]:
        return arguments(run_dir, self.shards, steps, "callbacks.checkpoint.every=10", *more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    runs = Straight(shards(folder / "shards"), folder / "one", folder / "two")
    assert here("train.py", *runs.arguments(runs.one)) == 0
    assert [finish(each) for each in start_ranks(runs.arguments(runs.two, *TWO), folder / "log")] == [0, 0], (
        folder / "log.0"
    ).read_text()
    return runs


def assert_same_run(a: Path, b: Path, killed: bool = False) -> None:
    """killed: a kill between the save after a step and the step's line in the log costs that line."""
    assert_same_checkpoint(a, b)
    lines, straight = ((each / "metrics.jsonl").read_text().splitlines() for each in (a, b))
    saved = [line for line in straight if json.loads(line)["step"] % 10 == 0] if killed else []
    assert lines == [line for line in straight if line in lines or line not in saved]


def test_r1_a_hundred_steps_are_37_and_63(straight: Straight, tmp_path: Path):
    assert here("train.py", *straight.arguments(tmp_path, steps=37), f"trainer.val_check_interval={STEPS}") == 0
    assert here("train.py", *straight.arguments(tmp_path)) == 0
    assert_same_run(tmp_path, straight.one)


@pytest.mark.slow
def test_r4_ranks_killed_at_random_moments(straight: Straight, tmp_path: Path):
    """Twenty starts of two ranks; each ends with the death of one of them: half of them as they start, half as they train."""
    draw, run_dir = random.Random(0), tmp_path / "run"
    words = straight.arguments(run_dir, *TWO)
    reached = set()
    for attempt in range(20):
        ranks = start_ranks(words, tmp_path / "log")
        victim, survivor = draw.sample(ranks, 2)
        if attempt % 2:
            target = saved_step(run_dir) + draw.randint(1, 12)
            wait_for(lambda target=target: last_step(run_dir) >= target)
        victim.join(draw.uniform(0.0, 0.05 if attempt % 2 else 1.0))
        assert victim.exitcode is None
        victim.kill()
        reached.add(last_step(run_dir))
        survivor.kill()  # srun and torchrun do
        for each in ranks:
            each.join()
        if saved_step(run_dir) > STEPS - 20:  # begin again: the moments should not all be of a complete run
            shutil.rmtree(run_dir)
    assert len(reached) > 5
    assert [finish(each) for each in start_ranks(words, tmp_path / "log")] == [0, 0], (tmp_path / "log.0").read_text()
    assert_same_run(run_dir, straight.two, killed=True)


def saved_step(run_dir: Path) -> int:
    path = checkpointing.newest(run_dir)
    return 0 if path is None else checkpointing.step_of(path)


def die_in_the_second_save(n: int) -> None:
    """At the n-th thing that it does to the file system."""
    saves, events = [0], [0]

    def wrap(place: object, name: str) -> None:
        own = getattr(place, name)

        def counted(*args: object, **options: object) -> object:
            if saves[0] == 2:
                events[0] += 1
                if events[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **options)

        setattr(place, name, counted)

    for place, name in ((torch, "save"), (os, "fsync"), (Path, "rename"), (Path, "unlink"), (Path, "write_text")):
        wrap(place, name)
    write = checkpointing.Checkpoint._write

    def save(*args: object) -> None:
        saves[0] += 1
        write(*args)

    checkpointing.Checkpoint._write = save


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_r5_a_kill_inside_a_save_leaves_a_loadable_run(straight: Straight, tmp_path: Path, asynchronous: bool):
    """At each call to the system that a save makes, and in the middle of the file."""
    steps = 30
    whole = tmp_path / "whole"
    assert here("train.py", *straight.arguments(whole, steps=steps)) == 0
    died = []
    for n in range(1, 12):
        run_dir = tmp_path / str(n)
        more = ["callbacks.checkpoint.keep=1", f"callbacks.checkpoint.asynchronous={asynchronous}"]
        words = straight.arguments(run_dir, *more, steps=steps)
        code = finish(start(words, tmp_path / "log", first=partial(die_in_the_second_save, n)))
        if code == 0:
            break
        died.append(code)
        path = checkpointing.newest(run_dir)
        assert checkpointing.step_of(path) in (10, 20)
        assert checkpointing.find_damage(path) == ""
        if n % 3 == 0:
            assert here("train.py", *words) == 0
            assert not list((run_dir / "checkpoints").glob("*.partial"))
            assert_same_run(run_dir, whole, killed=True)
    assert died == [-signal.SIGKILL] * len(died)
    assert len(died) >= 6


def test_r6_a_full_disk_costs_checkpoints_and_not_the_run(
    straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    usage = shutil.disk_usage
    full = lambda path: usage(path)._replace(free=0) if last_step(tmp_path) > 10 else usage(path)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.warns(
        UserWarning, match=r"step 20 was not saved \(OSError: .* MB are needed, 0 MB are free\); .*step_00000010"
    ):
        assert here("train.py", *straight.arguments(tmp_path)) == 0
    assert [p.name for p in checkpointing.by_step(tmp_path)] == ["step_00000010.ckpt"]
    monkeypatch.undo()
    assert here("train.py", *straight.arguments(tmp_path)) == 0
    assert_same_run(tmp_path, straight.one)


def test_r7_the_newest_damaged_then_the_one_before(
    straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = straight.arguments(tmp_path, "callbacks.checkpoint.keep=3")
    assert here("train.py", *words, "trainer.max_steps=30") == 0
    capsys.readouterr()
    newest = checkpointing.newest(tmp_path)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, which torch would load
    newest.write_bytes(content)
    before = tmp_path / "checkpoints" / "step_00000020.ckpt"
    before.with_suffix(".json").unlink()
    before.write_bytes(before.read_bytes()[:-100])
    assert here("train.py", *words) == 0
    said = capsys.readouterr().out
    assert "step_00000030.ckpt is passed over: its bytes are not those that were written" in said
    assert "step_00000020.ckpt is passed over: cannot read the checkpoint" in said
    assert "continues from step 10" in said
    assert_same_run(tmp_path, straight.one)


def test_r8_a_rank_that_stops_is_named_and_the_others_end(straight: Straight, tmp_path: Path):
    words = straight.arguments(
        tmp_path / "run", *TWO, "callbacks.watchdog.timeout=2", "callbacks.checkpoint.every=1000000", steps=100_000
    )
    ranks = start_ranks(words, tmp_path / "log")
    wait_for(lambda: last_step(tmp_path / "run") > 5)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    code = finish(ranks[0])
    ranks[1].kill()
    ranks[1].join()
    assert code == watchdog.STALLED
    (line,) = [row for row in (tmp_path / "log.0").read_text().splitlines() if row.startswith("error: ")]
    assert "has stood still for 2 s: rank 1 is " in line
    assert "dead or stopped" in line


def test_r10_a_wandb_that_never_answers_costs_seconds_and_not_the_run(straight: Straight, tmp_path: Path):
    run_dir = tmp_path / "run"
    words = straight.arguments(run_dir, "logger=wandb", "logger.name=survivor", "logger.timeout=2")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes every connection and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert finish(start(words, tmp_path / "log", first=partial(point_wandb_at, address))) == 0
    assert "W&B does not answer" in (tmp_path / "log").read_text()
    assert_same_run(run_dir, straight.one)
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))


def point_wandb_at(address: str) -> None:
    os.environ |= {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}


def test_a_signal_to_one_sharded_rank_stops_both_and_the_run_goes_on(straight: Straight, tmp_path: Path):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    words = straight.arguments(run_dir, *TWO_SHARDED, steps=40)
    assert [
        finish(each) for each in start_ranks(straight.arguments(whole, *TWO_SHARDED, steps=40), tmp_path / "log")
    ] == [0, 0]
    ranks = start_ranks(words, tmp_path / "log")
    wait_for(lambda: last_step(run_dir) >= 7)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    assert [finish(each) for each in ranks] == [75, 0], (tmp_path / "log.1").read_text()
    assert 7 <= saved_step(run_dir) < 40
    assert [finish(each) for each in start_ranks(words, tmp_path / "log")] == [0, 0]
    assert_same_run(run_dir, whole)


def test_r11_the_second_job_on_a_run_directory_is_refused(
    straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = straight.arguments(tmp_path / "run", steps=100_000)
    first = start(words, tmp_path / "log")
    wait_for(lambda: last_step(tmp_path / "run") > 5)
    assert here("train.py", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is in use by process {first.pid} on " in line
    first.kill()
    first.join()
    words = straight.arguments(tmp_path / "run")
    assert here("train.py", *words) == 0
    assert f"took over the lock of process {first.pid} on " in capsys.readouterr().out
    assert_same_run(tmp_path / "run", straight.one)
    assert not (tmp_path / "run" / "lock").exists()


def test_r12_five_requeues_are_one_run(straight: Straight, tmp_path: Path):
    """One directory, one W&B run, steps that only go up, and the weights of the run in one piece."""
    run_dir = tmp_path / "run"
    words = straight.arguments(run_dir, "logger=wandb", "logger.name=survivor")
    for begun in (5, 15, 25, 40, 55):  # far from the end: between what is seen and the signal there are steps
        process = start(words, tmp_path / "log")
        wait_for(lambda begun=begun: last_step(run_dir) >= begun)
        os.kill(process.pid, signal.SIGUSR1)
        assert finish(process) == 75, (tmp_path / "log").read_text()
        assert last_step(run_dir) == checkpointing.step_of(checkpointing.newest(run_dir)) < STEPS
    assert finish(start(words, tmp_path / "log")) == 0
    assert_same_run(run_dir, straight.one)
    identity = (run_dir / "wandb_id").read_text()
    parts = list(run_dir.glob("wandb/offline-run-*"))
    assert len(parts) == 6
    assert all(part.name.endswith(identity) for part in parts)
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_r13_a_checkpoint_of_an_older_version_is_gone_on_from_and_of_a_newer_one_refused(
    straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert here("train.py", *straight.arguments(tmp_path, steps=37), f"trainer.val_check_interval={STEPS}") == 0
    path = checkpointing.newest(tmp_path)
    checkpoint = checkpointing.read(path)
    for each in (tmp_path / "checkpoints").iterdir():
        each.unlink()
    new = {**checkpoint, "format": 99}
    torch.save(new, path)
    assert here("train.py", *straight.arguments(tmp_path)) == 2
    assert "a newer ldm wrote this checkpoint: format 99, this one reads up to 2" in capsys.readouterr().err
    del checkpoint["format"], checkpoint["faults"]  # as format 1 was
    torch.save(checkpoint, path)
    assert here("train.py", *straight.arguments(tmp_path)) == 0
    assert_same_run(tmp_path, straight.one)


def spoil_rank_1() -> None:
    """Its loss is NaN at step 5 (after four), and from step 21 on."""
    from ldm.training.autoencoder import AutoencoderModule

    own = AutoencoderModule.training_step

    def spoiled(self: AutoencoderModule, batch: dict, i: int) -> torch.Tensor:
        bad = self.global_rank == 1 and (self.global_step == 4 or self.global_step >= 20)
        return own(self, batch, i) * (torch.nan if bad else 1)

    AutoencoderModule.training_step = spoiled


@pytest.mark.parametrize("two", [TWO, TWO_SHARDED], ids=["ddp", "fsdp"])
def test_r14_a_nan_on_one_rank_moves_no_rank_and_k_in_a_row_stop_the_run(
    straight: Straight, tmp_path: Path, two: list[str]
):
    run_dir = tmp_path / "run"
    more = [
        "callbacks.checkpoint.every=1",
        "callbacks.checkpoint.keep=100",
        "callbacks.faults.limit=3",
        "data.log_keys=true",
    ]
    words = straight.arguments(run_dir, *two, *more)
    codes = [finish(each) for each in start_ranks(words, tmp_path / "log", first=spoil_rank_1)]
    assert codes == [2, 2]
    saved = {checkpointing.step_of(p): checkpointing.read(p) for p in checkpointing.by_step(run_dir)}
    assert max(saved) == 22  # 21 and 22 were left out, 23 was one too many
    for before, after in ((4, 5), (20, 22)):
        for part in ("state_dict", "ema"):
            assert torch.equal(flat(saved[before][part]), flat(saved[after][part]))
        assert torch.equal(flat(saved[before]["optimizer_states"]), flat(saved[after]["optimizer_states"]))
    assert not torch.equal(flat(saved[5]["state_dict"]), flat(saved[6]["state_dict"]))
    assert saved[5]["ShardDataModule"]["samples_seen"] == 20
    assert saved[22]["faults"] == {"total": 3, "in_a_row": 2}
    rows = [json.loads(line) for line in (run_dir / "nonfinite" / "rank1.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 21, 22, 23]
    assert rows[0]["loss"] == ["nan"]
    keys = [json.loads(line) for line in (run_dir / "keys" / "rank1.jsonl").read_text().splitlines()]
    assert rows[0]["keys"] == keys[4]["keys"]
    other = json.loads((run_dir / "nonfinite" / "rank0.jsonl").read_text().splitlines()[0])
    assert other["loss"] != ["nan"]
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("train/nonfinite") for row in logged[3:6]] == [None, 1.0, 1.0]
    errors = [line for line in (tmp_path / "log.0").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "step 23: a loss or gradient is not finite, 3 times in a row" in errors[0]


def flat(node: object) -> torch.Tensor:
    """All tensors of plain data, as one; the latents' statistics are NaN until a validation."""
    if isinstance(node, torch.Tensor):
        return node.double().flatten().nan_to_num(-7)
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    return torch.cat([torch.zeros(0, dtype=torch.float64), *map(flat, children)])


def test_the_logged_loss_is_that_of_all_ranks(straight: Straight):
    """Not the first rank's own: runs on more or fewer ranks are compared by it."""
    rows = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in straight[1:])
    one, two = ([row["train/distance"] for row in run if "train/distance" in row] for run in rows)
    assert len(one) == len(two) == STEPS
    assert two[:20] == pytest.approx(one[:20], rel=1e-4)
