"""Logs of one JSON object a line, each with its `step`."""

import json
from pathlib import Path


def cut_after(path: Path, step: int) -> None:
    """Drops what a killed run logged past the checkpoint at `step`: it is about to be logged again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line that the kill cut short
