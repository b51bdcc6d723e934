"""A SLURM of two nodes on this machine, for tests: its own munge key, sockets and ports; nothing outside its folder changes.

Debian: apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge
"""

import getpass
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")
SBIN = f"/usr/sbin:{os.environ.get('PATH', '')}"
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until its old credentials have expired: two minutes by default
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]


class Cluster:
    """Runs from its construction to `stop`.

    Args:
        folder: empty; its path is short, for it holds a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "WANDB_"))}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
        folder.chmod(0o755)  # munged looks
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        port = random.SystemRandom().randrange(25_000, 30_000, 10)  # jobs have those below
        host = subprocess.check_output(["hostname", "-s"], text=True).strip()
        (folder / "slurm.conf").write_text(
            CONF.format(folder=folder, host=host, user=getpass.getuser(), port=port, n1=port + 1, n2=port + 2)
        )
        self.run("munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock",
                 f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                 f"--seed-file={folder}/munge.seed")  # fmt: skip
        try:
            self._begin()
        except BaseException:
            self.stop()
            raise

    def _begin(self) -> None:
        folder = self.folder
        self.run("slurmctld", "-f", str(folder / "slurm.conf"))
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            self.run("slurmd", "-N", node, "-f", str(folder / "slurm.conf"))
        end = time.monotonic() + 120
        while self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() != ["n1", "n2"]:
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.1)

    def run(self, *command: str, **environment: str) -> str:
        """A command's output."""
        got = subprocess.run(command, env=self.environment | environment, capture_output=True, text=True, timeout=60)
        assert got.returncode == 0, f"{command}: {got.stderr}"
        return got.stdout

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED ..."""
        shown = self.run("scontrol", "show", "job", job, "--oneliner")
        return shown.partition("JobState=")[2].split()[0]

    def stop(self) -> None:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, timeout=60, check=False)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
