"""One picture of what shards hold: `ldm shards stats`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ldm.data.audit import SCORES, Audit
from ldm.errors import UserError

COLUMNS = 3
BARS = 40
TAIL = 99.5  # percentile; what lies beyond is gathered in the last bar, lest one long caption flatten all the others
INK, BLUE, ORANGE = "#333333", "#3b6fb6", "#e08a3c"


class _Panel(NamedTuple):
    title: str
    unit: str
    values: Mapping[str, Sequence[float]]  # name -> values; the names are shown when there are several


def draw(found: Audit, path: str | Path) -> None:
    """Writes a PNG of histograms: sizes, aspect ratios, caption lengths, and each score that the metadata has.

    Raises:
        UserError: no usable sample, or another ending than .png.
    """
    if not found.samples:
        raise UserError("the shards hold no usable sample to draw; see: ldm shards check")
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{path} does not end in .png; the histograms are one PNG picture")
    panels = _panels(found)
    rows = -(-len(panels) // COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(4.4 * COLUMNS, 3.3 * rows + 0.9), dpi=120, layout=layout)
    dropped = f", {found.dropped.total():,} dropped" if found.dropped else ""
    title = f"{len(found.samples):,} samples in {found.shards:,} shards{dropped}"
    figure.suptitle(title, fontsize=15, color=INK, weight="bold")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel, axis in zip(panels, axes, strict=False):
        _draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, format="png")


def _panels(found: Audit) -> list[_Panel]:
    samples = found.samples
    sizes = {"width": [s.width for s in samples], "height": [s.height for s in samples]}
    panels = [
        _Panel("picture size, as stored", "pixels", sizes),
        _Panel("aspect ratio", "width / height", {"": [s.width / s.height for s in samples]}),
        _Panel("caption length", "characters", {"": [s.characters for s in samples]}),
    ]
    for name in SCORES:
        if values := found.scores.get(name):
            share = f" ({len(values) / len(samples):.0%} of the samples)" if len(values) < len(samples) else ""
            panels.append(_Panel(f"{name}{share}", _UNITS[name], {"": values}))
    return panels


_UNITS = {
    "similarity": "cosine of picture and caption",
    "aesthetic": "predicted score, 1 to 10",
    "pwatermark": "probability",
    "punsafe": "probability",
}


def _draw_panel(axis: Axes, panel: _Panel) -> None:
    everything = np.concatenate([np.asarray(values, float) for values in panel.values.values()])
    edges, gathered = _edges(everything)
    for (name, values), color in zip(panel.values.items(), (BLUE, ORANGE), strict=False):
        clipped = np.clip(values, edges[0], edges[-1])
        median = np.median(values)
        label = f"{name} (median {median:.4g})".strip() if name else f"median {median:.4g}"
        axis.hist(clipped, list(edges), color=color, alpha=0.55 if len(panel.values) > 1 else 0.8, label=label)
        axis.axvline(min(median, edges[-1]), color=color, linewidth=1.3, linestyle="--")
    axis.set_title(panel.title, fontsize=12, color=INK, loc="left", weight="bold")
    axis.set_xlabel(panel.unit + (f"   (last bar: {gathered:.4g} and more)" if gathered else ""), color=INK)
    axis.set_ylabel("samples", color=INK)
    axis.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axis.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(axis="y", color="#e6e6e6")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=9)
    axis.set_ymargin(0.28)  # room for the legend
    axis.autoscale_view()
    axis.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK)


def _edges(values: np.ndarray) -> tuple[np.ndarray, float | None]:
    """The bars' edges, and where the last bar begins when it gathers a tail. Whole numbers get bars of whole numbers."""
    low, high = values.min(), values.max()
    tail = np.percentile(values, TAIL)
    gathers = high - low > 1.5 * (tail - low) > 0
    high = tail if gathers else high
    whole = bool((values == values.round()).all())
    width = max(1, round((high - low) / BARS))
    if whole:
        edges = np.arange(low, high + 2 * width, width) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, BARS + 1)
    return edges, float(edges[-2] + 0.5 * whole) if gathers else None
