"""What became of the samples: delivered, dropped by reason, and which ones a step was made of."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.decode import FILTERED
from ldm.data.shards import BadSample
from ldm.errors import UserError
from ldm.files import aside, cut_after

LEAST = 1000  # samples before the budget is a share: one bad sample among the first ten is no one's fault


@dataclass
class Tally:
    """Samples delivered, dropped by reason, and where the last of each reason was.

    Args:
        budget: share of the samples met that may be unusable; those that a filter drops do not count.
    """

    budget: float = 1.0
    delivered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    where: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise UserError(
                f"data.budget={self.budget}; it is the share of bad samples a run may meet: give one in [0, 1]"
            )

    def drop(self, bad: BadSample) -> None:
        self.dropped[bad.reason] += 1
        self.where[bad.reason] = bad.where

    def add(self, delivered: int, dropped: Mapping[str, int], where: Mapping[str, str]) -> None:
        self.delivered += delivered
        self.dropped.update(dropped)
        self.where |= where

    def check(self) -> None:
        """Raises UserError past the budget."""
        bad = {reason: n for reason, n in self.dropped.items() if not reason.startswith(FILTERED)}
        met = self.delivered + sum(bad.values())
        if sum(bad.values()) > self.budget * max(met, LEAST):
            reason = max(bad, key=bad.__getitem__)
            raise UserError(
                f"{sum(bad.values())} of {met} samples could not be used, more than data.budget={self.budget:g} allows; "
                f"most often {reason!r} ({bad[reason]}), the last at {self.where[reason]}; look with `ldm shards check`, "
                "or raise data.budget"
            )

    def __add__(self, other: "Tally") -> "Tally":
        both = self.delivered + other.delivered, self.dropped + other.dropped, self.where | other.where
        return Tally(self.budget, *both)

    def report(self) -> dict[str, Any]:
        """As plain data; from_report reads it."""
        counts = dict(sorted(self.dropped.items()))
        return {"delivered": self.delivered, "dropped": counts, "last_dropped": dict(sorted(self.where.items()))}

    @classmethod
    def from_report(cls, report: Mapping[str, Any], budget: float = 1.0) -> "Tally":
        return cls(budget, report["delivered"], Counter(report["dropped"]), dict(report["last_dropped"]))


def write_report(tally: Tally, run_dir: Path) -> None:
    """run_dir/data_report.json, whole at any moment."""
    with aside(run_dir / "data_report.json") as partial:
        partial.write_text(json.dumps(tally.report(), indent=1) + "\n")


class KeyLog:
    """run_dir/keys/rank<r>.jsonl: {"step": n, "keys": [...]}, what this rank's part of step n was made of.

    Rank r of W holds the samples r, r + W, ... of each step's batch.

    Args:
        folder: run_dir/keys.
        rank, world: of this process.
        step: steps done; what a killed run logged past it is cut off, it is about to be logged again.
    """

    def __init__(self, folder: Path, rank: int, world: int, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank}.jsonl"
        cut_after(self.path, step)
        if rank == 0:  # ranks of a larger world, before
            for other in folder.glob("rank*.jsonl"):
                if int(other.stem.removeprefix("rank")) >= world:
                    cut_after(other, step)
        self.file = self.path.open("a", buffering=1)

    def write(self, step: int, keys: Sequence[str]) -> None:
        self.file.write(json.dumps({"step": step, "keys": list(keys)}) + "\n")
