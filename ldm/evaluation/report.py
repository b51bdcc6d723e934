"""report.html of a run: one page, complete in itself, over all results of a checkpoint."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.evaluation.curve import best_of, headline, tradeoff
from ldm.evaluation.page import (
    LEVEL,
    Chart,
    Line,
    Picture,
    chart,
    direction,
    history,
    pictures,
    readable,
    render,
    rows,
    split,
)
from ldm.evaluation.protocol import flat, incomparable
from ldm.evaluation.results import Result, grouped, newest

GALLERY, SIDES, EXTREMES = 16, 6, 8  # pictures of each kind
FIRST = ("psnr", "ssim")  # of a first stage, what its scores begin with


def write(evaluation: Path, step: int) -> Path:
    """evaluation/report.html. evaluation: runs/<name>/evaluation, with results of the checkpoint at `step`."""
    run = evaluation.parent
    main, *others = (group[::-1] for group in grouped(newest(evaluation, step)))  # now in the order of their making
    shown = best(main)
    curve = tradeoff(main)
    side_by_side = [result for result in main if "others" not in result.protocol]  # of the same captions
    sampled = [result for result in main if "sampling" in result.protocol] or main
    alike, differ = split([readable(flat(result.protocol)) for result in sampled])
    config = run / "config.yaml"
    sides = matrix(side_by_side)
    html = render(
        "report.html",
        name=run.resolve().name,
        step=step,
        n=shown.protocol["n"],
        shown=shown,
        tiles=[row for row in rows([shown]) if row.name in (*headline(list(shown.metrics)), *FIRST)],
        labels=labels(main),
        rows=rows(main),
        curve=curve and sweep_chart(*curve),
        best=curve and _said(*curve),
        side_labels=labels(side_by_side),
        sides=sides if len(side_by_side) > 1 else [],
        gallery=pictures(shown, range(GALLERY)),
        extremes=extremes(shown),
        charts=training_charts(history(run, "step")),
        differ_labels=labels(sampled),
        alike=alike,
        differ=differ,
        others=[(labels(group), rows(group), incomparable(main[0].protocol, group[0].protocol)) for group in others],
        config=config.read_text() if config.exists() else "",
    )
    path = evaluation / "report.html"
    path.write_text(html)
    return path


def best(results: Sequence[Result]) -> Result:
    """Of those sampled the one with the lowest distance, or the last; without any, the last of all."""
    sampled = [result for result in results if "sampling" in result.protocol] or results
    distance, _ = headline(list(sampled[-1].metrics))
    measured = [result for result in sampled if distance in result.metrics]
    return min(measured, key=lambda result: result.metrics[str(distance)], default=sampled[-1])


def labels(results: Sequence[Result]) -> list[str]:
    """With the protocol's id where one occurs twice."""
    every = [result.label for result in results]
    return [r.label if every.count(r.label) == 1 else f"{r.label} ({r.protocol['id']})" for r in results]


def matrix(results: Sequence[Result]) -> list[list[Picture]]:
    """A line for each of the first captions that all results have a picture of."""
    columns = [pictures(result, range(SIDES)) for result in results]
    return [list(line) for line in zip(*columns, strict=False)]


def sweep_chart(lines: Mapping[str, list[tuple[str, float, float]]], x_name: str, y_name: str, swept: str) -> Chart:
    label, point = best_of(lines)
    texts = {name: [setting for setting, *_ in points] for name, points in lines.items()}
    at = {name: [(x, y) for _, x, y in points] for name, points in lines.items()}
    return chart(f"{y_name} ↓", at, x_name, texts, (label, lines[label].index(point)))


def _said(lines: Mapping[str, list[tuple[str, float, float]]], x_name: str, y_name: str, swept: str) -> str:
    label, (setting, _, y) = best_of(lines)
    return f"best {y_name}: {y:.4g} at {swept} {setting}{f', {label}' if label else ''}; the numbers are {swept}"


def extremes(result: Result) -> list[tuple[str, list[Picture], list[Picture]]]:
    """For each score that pictures have one by one: its name, the worst and the best pictures, those first."""
    out = []
    for name, scores in result.samples().items():
        order = sorted(range(len(scores)), key=lambda i: scores[i] * (direction(f"{name}/") or 1))
        notes = {i: f"{score:.3g}" for i, score in enumerate(scores)}
        count = min(EXTREMES, len(order) // 2)
        worst, best_ones = (pictures(result, part, notes) for part in (order[:count], order[::-1][:count]))
        if worst and scores[order[0]] != scores[order[-1]]:
            out.append((name, worst, best_ones))
    return out


def training_charts(lines: Mapping[str, Line]) -> list[Chart]:
    """What was logged, one chart for what is alike: train/loss and val/loss, the levels of a loss."""
    families: dict[str, dict[str, Line]] = {}
    for name, line in lines.items():
        family = LEVEL.sub("", re.sub(r"^(train/|val/raw/|val/)", "", name))
        families.setdefault(family, {})[name] = line
    return [
        chart(name, each, "step") for name, each in families.items() if any(len(line) > 1 for line in each.values())
    ]
