"""The promise of the data, checked as a user would: real processes, kills, and their key logs (bench/key_log.py)."""

import subprocess
import sys
from pathlib import Path

from conftest import write_shards
from tiny import ROOT


def test_ranks_workers_and_kills_leave_the_same_key_log(tmp_path: Path) -> None:
    shards = write_shards(
        tmp_path, [30] * 5
    )  # one for validation; 120 samples, some of them filtered: 24 x 8 is past them
    options = ["--batch_size=8", "--steps=24", "--longest=10", "--grid=[(1, 0), (2, 1), (4, 1)]"]
    got = subprocess.run(
        [sys.executable, ROOT / "bench" / "key_log.py", shards, *options], capture_output=True, text=True, timeout=1500
    )
    assert got.returncode == 0, got.stderr[-3000:]
    assert got.stdout.count("identical") == 4
    assert "'filter/length'" in got.stdout
