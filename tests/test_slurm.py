"""The batch scripts on a real SLURM of two nodes (slurm_cluster.py): interrupted, requeued, finished; the same bits."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster
from test_end_to_end import assert_same_checkpoint
from tiny import ROOT
from trials import arguments, last_step, shards, wait_for

from ldm.training import checkpointing

STEPS = 400
TWO = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()) and not os.environ.get("REQUIRE_SLURM"),
        reason=f"SLURM is not installed ({', '.join(slurm_cluster.missing())}); see slurm_cluster.py. Set REQUIRE_SLURM: no skip",
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert not slurm_cluster.missing()
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    cluster = Cluster(folder)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shards(tmp_path_factory.mktemp("shards"))


def submit(cluster: Cluster, script: str, options: list[str], words: list[str], log: Path) -> str:
    """The job's number."""
    where = [f"--chdir={ROOT}", f"--output={log}", "--parsable"]
    environment = {"PYTHON": sys.executable, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return cluster.run("sbatch", *where, *options, str(ROOT / "slurm" / script), *words, **environment).strip()


def ended(cluster: Cluster, job: str, log: Path) -> None:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(lambda: cluster.state(job) in over, 400)
    assert cluster.state(job) == "COMPLETED", log.read_text()


def test_a_job_that_is_asked_to_stop_is_requeued_and_ends_with_the_same_bits(
    cluster: Cluster, data: str, tmp_path: Path
):
    """Two ranks on two nodes; once by the signal that a time limit sends to the batch script, once straight to the ranks."""
    straight, run_dir, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log"
    more = ["trainer=ddp_cpu", "callbacks.checkpoint.every=100000"]
    job = submit(cluster, "train.sbatch", TWO, arguments(run_dir, data, STEPS, *more, "logger=wandb"), log)
    other = submit(cluster, "train.sbatch", TWO, arguments(straight, data, STEPS, *more), tmp_path / "log2")
    for signals in (["--batch"], []):
        begun = last_step(run_dir) + 10  # so that the job is in its next life, and past its start
        wait_for(lambda begun=begun: last_step(run_dir) >= begun, 200)
        cluster.run("scancel", *signals, "--signal=USR1", job)
        wait_for(lambda: cluster.state(job) != "RUNNING", 120)
    ended(cluster, job, log)
    ended(cluster, other, tmp_path / "log2")
    text = log.read_text()
    assert text.count(f"exit code 75, requeueing job {job}") == 2, text
    # SLURM signals one rank after another: the first may hear of it from the second
    assert len(re.findall(r"stopped by (SIGUSR1|another rank's signal) after step", text)) == 2, text
    assert "4 = 2 x 2 ranks" in text
    assert_same_checkpoint(run_dir, straight)
    assert (run_dir / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"straight", "run", "log", "log2"}  # no other run directory
    identity = (run_dir / "wandb_id").read_text()
    assert len(list(run_dir.glob(f"wandb/offline-run-*/run-{identity}.wandb"))) == 3
    assert len(list(run_dir.glob("wandb/offline-run-*"))) == 3


def test_ranks_that_are_asked_to_stop_while_they_start_are_requeued(cluster: Cluster, data: str, tmp_path: Path):
    """Killed by the signal (138), or already listening to it (75)."""
    log = tmp_path / "log"
    job = submit(cluster, "train.sbatch", TWO[1:], arguments(tmp_path / "run", data, 100_000), log)

    def requeued() -> bool:
        if log.exists() and "requeueing job" in log.read_text():
            return True
        cluster.run("scancel", "--signal=USR1", job)  # again: one that comes before the task is lost
        return False

    wait_for(lambda: cluster.state(job) == "RUNNING", 100)
    wait_for(requeued, 100)
    cluster.run("scancel", job)


def test_a_canceled_job_saves_and_does_not_come_back(cluster: Cluster, data: str, tmp_path: Path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = submit(cluster, "train.sbatch", TWO[1:], arguments(run_dir, data, 100_000), log)
    wait_for(lambda: last_step(run_dir) >= 5, 200)
    cluster.run("scancel", job)
    wait_for(lambda: cluster.state(job) == "CANCELLED", 60)
    wait_for(lambda: checkpointing.newest(run_dir) is not None, 10)
    assert checkpointing.find_damage(checkpointing.newest(run_dir)) == ""
    assert "requeueing" not in log.read_text()


def test_a_wrong_command_fails_once(cluster: Cluster, tmp_path: Path):
    job = submit(cluster, "train.sbatch", TWO[1:], ["experiment=demmo"], tmp_path / "log")
    wait_for(lambda: cluster.state(job) == "FAILED", 100)
    assert "error: there is no experiment/demmo; did you mean demo?" in (tmp_path / "log").read_text()


def test_a_sweep_of_four_lines_is_four_runs(cluster: Cluster, data: str, tmp_path: Path):
    lines = [f"model.optimizer.lr={lr} 'run_dir={tmp_path}/a b {lr}'" for lr in ("1e-3", "2e-3")]
    lines += [f"seed={seed} run_dir={tmp_path}/seed{seed}" for seed in (1, 2)]
    (tmp_path / "sweep.txt").write_text("\n".join(lines) + "\n")
    words = [each for each in arguments(tmp_path, data, 2) if not each.startswith("run_dir=")]
    job = submit(
        cluster, "sweep.sbatch", [*TWO[1:], "--array=1-4"], [str(tmp_path / "sweep.txt"), *words], tmp_path / "log%a"
    )
    for task in range(1, 5):
        ended(cluster, f"{job}_{task}", tmp_path / f"log{task}")
    for name in ("a b 1e-3", "a b 2e-3", "seed1", "seed2"):
        assert checkpointing.step_of(checkpointing.newest(tmp_path / name)) == 2
        assert last_step(tmp_path / name) == 2


def test_a_sweep_names_its_runs_by_file_and_line(tmp_path: Path):
    """Without SLURM: what the script would have run."""
    (tmp_path / "grid.txt").write_text("seed=1\nseed=2 'name=own x'\n")
    (tmp_path / "slurm").mkdir()
    shutil.copy(ROOT / "slurm" / "sweep.sbatch", tmp_path)
    (tmp_path / "slurm" / "train.sbatch").write_text('printf "%s|" "$@"\n')

    def run(task: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "sweep.sbatch", "grid.txt", "experiment=demo"], cwd=tmp_path, capture_output=True,
                              text=True, env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}, check=False)  # fmt: skip

    assert run(1).stdout == "experiment=demo|name=grid/1|seed=1|"
    assert run(2).stdout == "experiment=demo|name=grid/2|seed=2|name=own x|"
    assert run(3).returncode == 2
    assert "grid.txt has no line 3; give --array=1-2" in run(3).stderr


def test_evaluation_by_its_script(cluster: Cluster, tmp_path: Path):
    job = submit(cluster, "evaluate.sbatch", ["--cpus-per-task=1"], [f"checkpoint={tmp_path}/none"], tmp_path / "log")
    wait_for(lambda: cluster.state(job) == "FAILED", 100)
    assert "there is no run in " in (tmp_path / "log").read_text()


def test_the_scripts_ask_for_a_signal_before_the_time_limit_and_for_a_requeue():
    for line in ("--signal=B:USR1@300", "--requeue", "--open-mode=append"):
        for script in ("train", "sweep"):
            assert f"#SBATCH {line}\n" in (ROOT / "slurm" / f"{script}.sbatch").read_text()
