"""Runs read from their directories, against runs made by hand."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import ROOT

from ldm import runs
from ldm.errors import UserError
from ldm.training import lock


def make(folder: Path, steps: tuple[int, ...] = (), rows: tuple[dict, ...] = (), of: int | None = 100) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        (folder / "checkpoints" / f"step_{step:08d}.ckpt").touch()
    trainer = {} if of is None else {"trainer": {"max_steps": of}}
    target = {"_target_": "ldm.training.latent_diffusion.LatentDiffusionModule"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": folder.name, "model": target, **trainer}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_where_a_run_stands(tmp_path: Path):
    rows = ({"step": 40, "samples_seen": 80, "val/loss": 0.5}, {"step": 60, "samples_seen": 120, "train/loss": None})
    run = runs.read(make(tmp_path / "a", (20, 40), rows))
    assert (run.name, run.model, run.state, run.step, run.of) == ("a", "LatentDiffusion", "stopped", 60, 100)
    assert run.metrics == {"val/loss": 0.5, "train/loss": None}
    assert runs.headline(run.metrics) == "val/loss 0.5"
    assert runs.read(make(tmp_path / "b", (100,))).state == "finished"
    assert runs.read(make(tmp_path / "imported", (0,), of=None)).state == "finished"
    assert runs.read(make(tmp_path / "c")).step == 0


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path):
    path = make(tmp_path / "a", (20,))
    with lock.owned(path):  # read from outside: a process that closes the file gives up its own lock
        code = f"from pathlib import Path; from ldm import runs; print(runs.read(Path({str(path)!r})).state)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "running\n"
    assert runs.read(path).state == "stopped"
    me = {"host": socket.gethostname(), "pid": os.getpid(), "job": None}
    (path / "lock").write_text(json.dumps(me))  # its owner died
    assert runs.read(path).state == "stopped"
    (path / "lock").write_text(json.dumps({**me, "host": "node7"}))
    assert runs.read(path).state == "running on node7"
    (path / "lock").write_text("")
    assert runs.read(path).state == "stopped"


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path):
    path = make(tmp_path / "a", rows=tuple({"step": step, "x": 1.0} for step in range(5000)))
    assert (path / "metrics.jsonl").stat().st_size > runs.TAIL
    rows = runs.last_rows(path)
    assert (rows[-1]["step"], len(rows) < 5000) == (4999, True)
    assert [row["step"] for row in rows] == list(range(rows[0]["step"], 5000))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5000, "x"')  # cut by a crash
    assert runs.last_rows(path)[-1]["step"] == 4999


def test_runs_are_found_also_one_level_down(tmp_path: Path):
    made = [make(tmp_path / name) for name in ("a", "sweep/lr=1", "sweep/lr=2")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").touch()
    assert list(runs.find(tmp_path)) == made


def test_a_directory_without_a_run_says_what_is_beside_it(tmp_path: Path):
    make(tmp_path / "demo")
    with pytest.raises(UserError, match=r"there is no run in .*/dmo \(no config.yaml\); beside it there are: demo"):
        runs.read(tmp_path / "dmo")


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "just now"), (120, "2 min ago"), (7200, "2 h ago"), (3e5, "3 d ago")]
)
def test_ages(seconds: float, said: str):
    assert runs.ago(seconds) == said


def test_reading_runs_needs_no_torch():
    code = "import sys, ldm.runs, ldm.config_help; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
