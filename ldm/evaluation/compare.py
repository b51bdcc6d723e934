"""Runs side by side: what differs in their configuration, and the scores that compare."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ldm.errors import UserError
from ldm.evaluation.page import LEVEL, Chart, Picture, chart, history, readable, render, rows, split
from ldm.evaluation.protocol import COMPARED, differences, flat, incomparable
from ldm.evaluation.report import matrix
from ldm.evaluation.results import Result, newest, step_of, table

OWN = "(its own)"  # in place of a run's name and directory, which always differ
WATCHED = ("callbacks", "logger", "resume")  # keys that say how a run is watched, not what it learns from


class Run(NamedTuple):
    """A run's directory, read. step: of the checkpoint that its results are of, None without any."""

    name: str
    folder: Path
    config: dict[str, Any]
    results: list[Result]
    step: int | None


class Group(NamedTuple):
    """Results of several runs that compare: one of each, called after its run. made: what differs in how they were made."""

    label: str
    results: list[Result]
    made: dict[str, list[Any]]


class Comparison(NamedTuple):
    """apart: (label, run, the run that is nearest, what keeps them from comparing); nearest None: no other has the label."""

    runs: list[Run]
    config: dict[str, list[Any]]
    groups: list[Group]
    apart: list[tuple[str, str, str | None, dict[str, tuple[Any, Any]]]]


def compare(folders: Sequence[Path]) -> Comparison:
    """Raises UserError for less than two runs, or a directory without one."""
    if len(folders) < 2:
        raise UserError(f"there is nothing to compare {folders[0]} with; give two runs or more")
    once = len({folder.resolve().name for folder in folders}) == len(folders)
    runs = [_read(folder, folder.resolve().name if once else str(folder)) for folder in folders]
    differ = split([run.config for run in runs])[1]
    lacking = tuple(f"{key}." for key, values in differ.items() if None in values)  # an object that one run has none of
    config = {key: values for key, values in differ.items() if not key.startswith(lacking)}
    entries = [(run.name, result) for run in runs for result in run.results]
    groups, apart = [], []
    for label in dict.fromkeys(result.label for run in runs for result in run.results[::-1]):  # as they were made
        alike = [(name, result) for name, result in entries if result.label == label]
        sets, alone = _matched(alike)
        groups += [_group(label, each) for each in sets]
        if sum(bool(run.results) for run in runs) > 1:
            apart += [(label, name, *_nearest(name, result, alike)) for name, result in alone]
    groups.sort(key=lambda group: "sampling" not in group.results[0].protocol)  # what was sampled comes first
    return Comparison(runs, config, groups, apart)


def _read(folder: Path, name: str) -> Run:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"there is no run in {folder} (no config.yaml); give the directories of runs")
    config = yaml.safe_load(path.read_text())
    own = (config.get("run_dir"), config.get("name"))
    values = {
        key: OWN if value in own and value is not None else value for key, value in readable(flat(config)).items()
    }
    results = newest(folder / "evaluation")
    return Run(name, folder, values, results, step_of(results[0].folder) if results else None)


def _matched(entries: list[tuple[str, Result]]) -> tuple[list[dict[str, Result]], list[tuple[str, Result]]]:
    """Sets of results that compare, one of each run, and those that are left alone."""
    sets: list[dict[str, Result]] = []
    for name, result in entries:
        fits = (
            s for s in sets if name not in s and not any(incomparable(result.protocol, r.protocol) for r in s.values())
        )
        if (found := next(fits, None)) is None:
            sets.append(found := {})
        found[name] = result
    return [each for each in sets if len(each) > 1], [pair for each in sets if len(each) == 1 for pair in each.items()]


def _group(label: str, found: dict[str, Result]) -> Group:
    differ = split([readable(flat(result.protocol)) for result in found.values()])[1]
    made = {key: values for key, values in differ.items() if key.partition(".")[0] not in ("id", *COMPARED)}
    return Group(label, [result._replace(label=name) for name, result in found.items()], made)


def _nearest(name: str, own: Result, alike: list[tuple[str, Result]]) -> tuple[str | None, dict[str, tuple[Any, Any]]]:
    others = [(other, incomparable(own.protocol, r.protocol)) for other, r in alike if other != name]
    return min(others, key=lambda pair: len(pair[1]), default=(None, {}))


def sentences(comparison: Comparison) -> Iterator[str]:
    """What is not compared, and why."""
    for label, name, other, differ in comparison.apart:
        if other is None:
            yield f"{label}: only {name} has it"
        elif differ:
            yield f"{label}: {name} and {other} differ in " + "; ".join(
                f"{k}: {a} and {b}" for k, (a, b) in differ.items()
            )
        else:
            yield f"{label}: {name} has it once more, made otherwise"
    yield from (
        f"{run.name} has no scores: python evaluate.py checkpoint={run.folder}"
        for run in comparison.runs
        if not run.results
    )


def tables(comparison: Comparison) -> Iterator[Table]:
    """For a terminal."""
    out = Table(title="configuration", box=SIMPLE_HEAD)
    for name in ("", *(run.name for run in comparison.runs)):
        out.add_column(escape(name), overflow="fold")
    for key, values in comparison.config.items():
        out.add_row(*(escape(each) for each in (key, *map(_shown, values))))
    yield out
    for group in comparison.groups:
        made = "".join(f"\n{key}: {', '.join(map(_shown, values))}" for key, values in group.made.items())
        yield table(group.results, f"{group.label}, n={group.results[0].protocol['n']}{made}")


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def plain(comparison: Comparison) -> dict[str, Any]:
    """As JSON has it."""
    scores = [
        {
            "label": group.label,
            "protocols": {result.label: result.protocol["id"] for result in group.results},
            "made_differently": {key: dict(zip(_names(group), row, strict=True)) for key, row in group.made.items()},
            "metrics": {result.label: result.metrics for result in group.results},
        }
        for group in comparison.groups
    ]
    runs = {run.name: {"folder": str(run.folder), "step": run.step} for run in comparison.runs}
    config = {key: dict(zip(runs, row, strict=True)) for key, row in comparison.config.items()}
    apart = [
        {"label": label, "run": run, "nearest": other, "differ": differ}
        for label, run, other, differ in comparison.apart
    ]
    return {"runs": runs, "config": config, "scores": scores, "not_compared": apart}


def _names(group: Group) -> list[str]:
    return [result.label for result in group.results]


def write(comparison: Comparison, path: Path) -> None:
    """The page."""
    groups = [
        {"label": group.label, "names": _names(group), "rows": rows(group.results), "made": group.made,
         "pictures": _pictures(group)}
        for group in comparison.groups
    ]  # fmt: skip
    watched = {key: values for key, values in comparison.config.items() if key.partition(".")[0] in WATCHED}
    html = render(
        "compare.html",
        names=[run.name for run in comparison.runs],
        steps=[(run.name, run.step) for run in comparison.runs],
        config={key: values for key, values in comparison.config.items() if key not in watched},
        watched=watched,
        groups=groups,
        apart=list(sentences(comparison)),
        charts=_charts(comparison.runs),
    )
    path.write_text(html)


def _pictures(group: Group) -> list[list[Picture]]:
    """Where captions and noise are the same; not of real ones."""
    protocols = [result.protocol for result in group.results]
    differ = {key for other in protocols[1:] for key in differences(protocols[0], other)}
    same = not differ & {"seed", "noise"} and protocols[0].get("made") != "real"
    return matrix(group.results) if same else []


def _charts(runs: Sequence[Run]) -> list[Chart]:
    """What several runs logged, over the samples that they have seen; levels of a loss aside."""
    lines = {run.name: history(run.folder, "samples_seen") for run in runs}
    logged = [
        name for name in dict.fromkeys(name for each in lines.values() for name in each) if not LEVEL.search(name)
    ]
    shared = {name: {run: each.get(name, []) for run, each in lines.items()} for name in logged}
    return [
        chart(name, each, "samples seen")
        for name, each in shared.items()
        if sum(bool(line) for line in each.values()) > 1 and any(len(line) > 1 for line in each.values())
    ]
