"""Runs as they lie on a disk, read without torch: where each stands, what it last measured, what is in its directory."""

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ldm.errors import UserError

TAIL = 2**16  # bytes of metrics.jsonl that are read: the last lines are in them


class Run(NamedTuple):
    """A run's directory. state: running, stopped or finished; step of the last line logged; age: seconds since then."""

    path: Path
    name: str
    model: str
    state: str
    step: int
    of: int | None
    age: float
    metrics: dict[str, float]


def read(path: Path) -> Run:
    """Raises UserError for a directory that is no run's."""
    config = config_of(path)
    rows = last_rows(path)
    newest = max((int(file.stem.removeprefix("step_")) for file in checkpoints(path)), default=0)
    step = max([newest, *(row["step"] for row in rows)])
    of = (config.get("trainer") or {}).get("max_steps")
    metrics = {key: value for row in rows for key, value in row.items() if key not in ("step", "samples_seen")}
    latest = max(file.stat().st_mtime for file in (path / "metrics.jsonl", path / "config.yaml") if file.exists())
    owner = _owner(path / "lock")
    state = owner or ("finished" if of is None or newest >= of else "stopped")
    model = config["model"]["_target_"].rpartition(".")[2].removesuffix("Module")
    return Run(path, str(config["name"]), model, state, step, of, time.time() - latest, metrics)


def config_of(path: Path) -> dict[str, Any]:
    """A run's resolved configuration. Raises UserError for a directory that is no run's."""
    file = path / "config.yaml"
    if not file.is_file():
        there = ", ".join(sorted(each.name for each in find(path.parent))) if path.parent.is_dir() else ""
        raise UserError(
            f"there is no run in {path} (no config.yaml){f'; beside it there are: {there}' if there else ''}"
        )
    return yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def find(folder: Path) -> Iterator[Path]:
    """The runs under a folder: names may hold one `/`."""
    for config in sorted([*folder.glob("*/config.yaml"), *folder.glob("*/*/config.yaml")]):
        if (config.parent / "checkpoints").is_dir():
            yield config.parent


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last lines of a run's log, in order."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - TAIL))
        lines = log.read().split(b"\n")[file.stat().st_size > TAIL :]
    return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]


def checkpoints(path: Path) -> list[Path]:
    """The newest last."""
    return sorted(file for file in (path / "checkpoints").glob("*.ckpt") if re.fullmatch(r"step_\d+", file.stem))


def headline(metrics: dict[str, float]) -> str:
    """The few values that say how a run does: of the validation where there has been one."""
    shown = [key for key in metrics if key.startswith("val/") and "_level_" not in key and "raw" not in key] or [
        *metrics
    ]
    return ", ".join(f"{key} {metrics[key]:.4g}" for key in shown[:3] if metrics[key] is not None)


def ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def _owner(lock: Path) -> str | None:
    """running, if a process of this host holds the lock; of another host that cannot be seen."""
    try:
        owner = json.loads(lock.read_text())
        inode = lock.stat().st_ino  # which the kernel lists with every lock that is held
    except (OSError, json.JSONDecodeError):
        return None
    if owner.get("host") != socket.gethostname():
        return f"running on {owner.get('host')}"
    held = Path("/proc/locks").read_text().split()
    return "running" if any(word.endswith(f":{inode}") for word in held) else None
