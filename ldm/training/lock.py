"""One job at a time on a run directory: run_dir/lock names its owner, and the kernel frees it when the owner dies."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pytorch_lightning.utilities import rank_zero_only

from ldm.errors import UserError
from ldm.training.session import say


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Makes the directory and holds its lock inside the block; on other ranks than the first, does nothing.

    The lock of a dead process of this host, or of an earlier start of this SLURM job, is taken over, and said.

    Raises:
        UserError: another job has it, or may have it: locks do not reach every host.
    """
    if rank_zero_only.rank:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock"
    me = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    with _locked(path) as file:
        owner = _read(file)
        if owner:
            if owner["host"] != me["host"] and (me["job"] is None or owner["job"] != me["job"]):
                raise _refusal(path, owner)
            say(f"took over the lock of process {owner['pid']} on {owner['host']}, which ended without giving it back")
        file.seek(0)
        file.truncate()
        file.write(json.dumps(me))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> TextIO:
    """The lock file, open and locked. A POSIX lock: a forked data worker that outlives its parent does not inherit it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{path} cannot be locked ({error.strerror}): put run_dir on a file system with POSIX locks (Lustre: "
                    "mounted with -o flock)"
                ) from error
            raise _refusal(path, _read(file)) from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its owner deleted it just now


def _read(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.loads(file.read())
    except json.JSONDecodeError:
        return {}  # new, or its owner is just writing it


def _refusal(path: Path, owner: dict[str, Any]) -> UserError:
    job = f" (SLURM job {owner['job']})" if owner.get("job") else ""
    hours = (time.time() - path.stat().st_mtime) / 3600
    return UserError(
        f"{path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}{job} for {hours:.1f} h: "
        f"give another name=, or stop that job; if it is gone, delete {path}"
    )
