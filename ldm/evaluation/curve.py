"""The curve of a sweep: a distance against alignment, one point a setting, the best one marked."""

import io

from matplotlib.figure import Figure
from PIL import Image

from ldm.evaluation.latent_plot import BLUE, INK

BEST = "#c8553d"


def tradeoff_curve(
    lines: dict[str, list[tuple[str, float, float]]], x_name: str, y_name: str, swept: str
) -> Image.Image:
    """lines: label -> points (setting, x, y), joined in their order; y is a distance: the lowest of all is the best.

    swept: what the settings are of.
    """
    figure = Figure(figsize=(7, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (label, points) in enumerate(lines.items()):
        settings, x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", color=BLUE, alpha=1 - 0.7 * i / len(lines), label=label, markersize=4, linewidth=1.4)
        for setting, *at in zip(settings, x, y, strict=True):
            axes.annotate(setting, at, (5, 5), textcoords="offset points", fontsize=8, color=INK)
    (setting, *at), label = min(((p, label) for label, points in lines.items() for p in points), key=lambda p: p[0][2])
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
