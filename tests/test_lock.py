import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pytorch_lightning.utilities import rank_zero_only
from tiny import ROOT

from ldm.errors import UserError
from ldm.training import lock

HOLD = """
import sys, time
from pathlib import Path
from ldm.training import lock
with lock.owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def left(path: Path, **owner: object) -> None:
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 12345, "job": None} | owner))


def test_it_is_held_inside_the_block_and_gone_after_it(tmp_path: Path):
    run_dir = tmp_path / "runs" / "new"
    with lock.owned(run_dir):
        owner = json.loads((run_dir / "lock").read_text())
        assert owner == {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    assert list(run_dir.iterdir()) == []
    with pytest.raises(ZeroDivisionError), lock.owned(run_dir):
        1 / 0  # noqa: B018
    assert list(run_dir.iterdir()) == []


def test_a_living_owner_is_named_and_a_dead_one_s_lock_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    owner = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is in use by process {owner.pid} on {socket.gethostname()} for 0.0 h: give"):
        with lock.owned(tmp_path):
            pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / "lock").exists()
    with lock.owned(tmp_path):
        assert f"took over the lock of process {owner.pid}" in capsys.readouterr().out
    assert not (tmp_path / "lock").exists()


def test_another_host_s_lock_is_not_taken_over_but_for_the_same_slurm_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Whether its process lives cannot be seen from here; a job that SLURM requeued is not running anywhere else."""
    left(tmp_path / "lock", host="n7", job="41")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for job in (None, "42"):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(
            UserError, match=r"in use by process 12345 on n7 \(SLURM job 41\) .*; if it is gone, delete"
        ):
            with lock.owned(tmp_path):
                pass
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with lock.owned(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "took over the lock of process 12345 on n7" in capsys.readouterr().out


def test_an_owner_that_is_just_leaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file was opened before it was deleted, and another made since: a lock on it would hold nothing."""
    path = tmp_path / "lock"
    lockf, calls = lock.fcntl.lockf, []

    def slow(*arguments: object) -> None:
        if not calls:
            path.unlink()
            path.touch()
        calls.append(arguments)
        lockf(*arguments)

    monkeypatch.setattr(lock.fcntl, "lockf", slow)
    with lock.owned(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert len(calls) == 2


def test_other_ranks_leave_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with lock.owned(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_is_not_taken_for_a_lock_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.raises(
        UserError, match=r"cannot be locked \(Function not implemented\): put run_dir on a file system with"
    ):
        with lock.owned(tmp_path):
            pass
