"""The curve of a sweep: a distance against alignment, one point a setting, the best one marked."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from ldm.evaluation.latent_plot import BLUE, INK
from ldm.evaluation.results import Result

BEST = "#c8553d"
ALIGNMENT = ("clip_cosine/", "caption_accuracy/all")  # what the curve sets against the first distance
DISTANCES = ("frechet/", "cmmd/", "kid/")
Points = list[tuple[str, float, float]]  # (setting, x, y)


class Tradeoff(NamedTuple):
    """What tradeoff_curve draws."""

    lines: dict[str, Points]
    x_name: str
    y_name: str
    swept: str


def headline(names: Sequence[str]) -> tuple[str | None, str | None]:
    """The names of the distance and of the measure of alignment that say most, out of those of scores."""
    distances = [name for start in DISTANCES for name in names if name.startswith(start) and name.count("/") == 1]
    alignment = next((name for start in ALIGNMENT for name in names if name.startswith(start)), None)
    return min(
        distances, key=lambda name: "/pixels" in name, default=None
    ), alignment  # what knows of meaning comes first


def tradeoff(results: Sequence[Result]) -> Tradeoff | None:
    """The distance against alignment, or against what was swept; None without a sweep."""
    swept = [result for result in results if result.swept]
    # earlier sweeps may have had other axes
    swept = [result for result in swept if result.swept.keys() == swept[-1].swept.keys()]
    distance, alignment = headline(list(swept[0].metrics) if len(swept) > 1 else [])
    # a score may be of some pictures alone, and earlier results may be of other metrics
    swept = [result for result in swept if {distance, alignment or distance} <= result.metrics.keys()]
    if distance is None or len(swept) < 2:
        return None
    axis = max(swept[0].swept, key=lambda name: len({str(result.swept[name]) for result in swept}))
    settings = list(dict.fromkeys(result.swept[axis] for result in swept))
    places = settings if all(isinstance(each, int | float) for each in settings) else range(len(settings))
    place = dict(zip(settings, places, strict=True))  # an average may be a file's name: then in their order
    lines: dict[str, Points] = {}
    for result in swept:
        other = ", ".join(f"{name} {value}" for name, value in result.swept.items() if name != axis)
        x = place[result.swept[axis]] if alignment is None else result.metrics[alignment]
        lines.setdefault(other, []).append((str(result.swept[axis]), x, result.metrics[distance]))
    return Tradeoff(lines, f"{alignment} →" if alignment else axis, distance, axis)


def best_of(lines: Mapping[str, Points]) -> tuple[str, tuple[str, float, float]]:
    """The line and its point of the lowest distance."""
    return min(((label, p) for label, points in lines.items() for p in points), key=lambda found: found[1][2])


def tradeoff_curve(lines: dict[str, Points], x_name: str, y_name: str, swept: str) -> Image.Image:
    """lines: label -> points (setting, x, y), joined in their order; y is a distance: the lowest of all is the best.

    swept: what the settings are of.
    """
    figure = Figure(figsize=(7, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (label, points) in enumerate(lines.items()):
        settings, x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=BLUE, alpha=1 - 0.7 * i / len(lines), label=label, markersize=4, linewidth=1.4)
        for setting, across, up in zip(settings, x, y, strict=True):
            axes.annotate(setting, (across, up), (5, 5), textcoords="offset points", fontsize=8, color=INK)
    label, (setting, *at) = best_of(lines)
    axes.plot(*at, "o", color=BEST, markersize=11, fillstyle="none", markeredgewidth=2)
    where = f"{swept} {setting}{f', {label}' if label else ''}"
    axes.set_title(f"best {y_name}: {at[1]:.4g} at {where}", fontsize=10, color=INK)
    axes.set_xlabel(x_name, color=INK)
    axes.set_ylabel(f"← {y_name}", color=INK)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.margins(0.1)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
