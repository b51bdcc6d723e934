"""Results as they lie in a run's directory: scores under their protocols, scores of each picture, and as one table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ldm.evaluation.protocol import incomparable, refuse_incomparable, under


class Result(NamedTuple):
    """What a round gave, and where it is written."""

    label: str
    swept: dict[str, Any]
    protocol: dict[str, Any]
    metrics: dict[str, float]
    folder: Path

    @classmethod
    def read(cls, folder: Path) -> "Result":
        content = json.loads((folder / "results.json").read_text())
        label = content.get("label", folder.name.partition("-")[2].rpartition("-")[0])  # older ones have none
        return cls(label, content.get("swept", {}), content["protocol"], content["metrics"], folder)

    def logged(self) -> dict[str, float]:
        """The scores under names that hold their protocol: frechet/inception/n30000/cfg3/steps50."""
        return {f"{name}/{under(self.protocol)}": value for name, value in self.metrics.items()}

    def samples(self) -> dict[str, list[float]]:
        """Scores of each picture, by name."""
        path = self.folder / "samples.json"
        return json.loads(path.read_text()) if path.exists() else {}


def step_of(folder: Path) -> int:
    """Of a result's folder: step1850-guidance3-9bf7645f."""
    return int(folder.name.partition("-")[0].removeprefix("step"))


def newest(evaluation: Path, step: int | None = None) -> list[Result]:
    """The results of one checkpoint, the newest first.

    evaluation: runs/<name>/evaluation; step: of the checkpoint, None: the last that has any.
    """
    folders = [path.parent for path in evaluation.glob("step*/results.json")]
    last = max(map(step_of, folders), default=None) if step is None else step
    folders = [folder for folder in folders if step_of(folder) == last]
    folders.sort(key=lambda folder: (folder / "results.json").stat().st_mtime_ns, reverse=True)
    return [Result.read(folder) for folder in folders]


def grouped(results: Sequence[Result]) -> list[list[Result]]:
    """Those that compare with each other, in their order."""
    groups: list[list[Result]] = []
    for result in results:
        fitting = (group for group in groups if not any(incomparable(result.protocol, o.protocol) for o in group))
        if (group := next(fitting, None)) is None:
            groups.append(group := [])
        group.append(result)
    return groups


def table(results: Sequence[Result], title: str) -> Table:
    """Metrics down, rounds across, ± half a 95 % interval. Raises UserError for results that do not compare."""
    first = results[0]
    for result in results[1:]:
        refuse_incomparable(first.protocol, result.protocol)
    out = Table(title=escape(title), box=SIMPLE_HEAD)
    out.add_column("metric", no_wrap=True)
    for result in results:
        out.add_column(escape(result.label.replace(" ", "\n")), justify="right")
    for name in names(results):
        out.add_row(name, *(cell(result.metrics, name) for result in results))
    return out


def names(results: Sequence[Result]) -> list[str]:
    """Of the scores, in order, intervals aside."""
    every = dict.fromkeys(name for result in results for name in result.metrics)
    return [name for name in every if not name.endswith("/ci95")]


def cell(values: dict[str, float], name: str) -> str:
    if name not in values:
        return ""
    spread = f" ±{values[f'{name}/ci95']:.3f}" if f"{name}/ci95" in values else ""
    return f"{values[name]:.3f}{spread}"
