"""What pages are made of: pictures and charts inside the page, tables of what agrees and what differs. No network, no script."""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from PIL import Image

from ldm.evaluation.generate import Kept, kept
from ldm.evaluation.results import Result, names

SMALL, SHOWN = 128, 256  # pixels: pictures up to the first stay as they are, larger ones are shown at the second
LEVEL = re.compile(r"[_/]([\d.]+|below)$")  # what names of values by noise level end in
POINTS, SPARSE = 300, 12  # of a line: more are averaged; fewer are marked one by one
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 250, 52, 40, 14, 16  # of a chart and its margins
DECADES = 100  # values that spread over more than this factor are drawn on a logarithmic axis
LOWER = ("frechet/", "kid/", "cmmd/", "lpips", "perceptual/")  # is better
HIGHER = ("psnr", "ssim", "precision/", "recall/", "density/", "coverage/", "clip_cosine", "caption_accuracy/",
          "inception_score/")  # fmt: skip

Line = list[tuple[float, float]]


def render(template: str, **values: Any) -> str:
    """A page. Every value is escaped: captions and names are anybody's text."""
    folder = Path(__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["breakable"] = lambda text: Markup("<wbr>").join(re.split(r"(?<=[._/])", text))
    return environment.get_template(template).render(**values)


class Axis(NamedTuple):
    """Values to pixels. ticks: (pixel, text)."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float, may_log: bool) -> "Axis":
        found = list(values)
        log = may_log and min(found) > 0 and max(found) / min(found) > DECADES
        low, high = (math.log10(f(found)) if log else f(found) for f in (min, max))
        margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(low - margin, high + margin, log, start, end)

    def __call__(self, value: float) -> float:
        at = (math.log10(value) if self.log else value) - self.low
        return round(self.start + (self.end - self.start) * at / (self.high - self.low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        low, high = (10**each if self.log else each for each in (self.low, self.high))
        values = (LogLocator() if self.log else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])).tick_values(low, high)
        inside = [float(value) for value in values if low <= value <= high]
        places = max((len(f"{value:.10f}".rstrip("0").partition(".")[2]) for value in inside), default=0)
        big = EngFormatter(sep="")
        alike = all(v == 0 or 1e-5 <= abs(v) < 1e4 for v in inside) and not self.log
        return [(self(v), f"{v:.{places}f}" if alike else big(v) if abs(v) >= 1 else f"{v:g}") for v in inside]


class Mark(NamedTuple):
    """A point of a chart: where it and its text are, what is said of it, whether it is the best."""

    x: float
    y: float
    text: str
    text_x: float
    text_y: float
    title: str
    best: bool


class Drawn(NamedTuple):
    """A line of a chart in pixels. color: its number; points: as SVG has them; last: its last value."""

    name: str
    color: int
    points: str
    marks: list[Mark]
    last: float


class Chart(NamedTuple):
    """A chart in pixels, ready for the page."""

    title: str
    x_name: str
    lines: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    log: bool


def chart(
    title: str, lines: Mapping[str, Line], x_name: str, labels: Mapping[str, Sequence[str]] | None = None,
    best: tuple[str, int] | None = None,
) -> Chart:  # fmt: skip
    """lines: name -> points, none for a line that is left out; labels: a text at each point of a line; best: the line and the
    number of the point to mark."""
    every = [point for line in lines.values() for point in line]
    x_axis = Axis.of((x for x, _ in every), LEFT, WIDTH - RIGHT, False)
    y_axis = Axis.of((y for _, y in every), HEIGHT - BOTTOM, TOP, True)
    drawn, taken = [], list[tuple[float, float, float]]()
    for color, (name, line) in enumerate(lines.items()):
        if not line:
            continue
        at = [(x_axis(x), y_axis(y)) for x, y in line]
        texts = labels[name] if labels else [""] * len(line)
        marks = []
        for i, ((x, y), value, text) in enumerate(zip(at, line, texts, strict=True)):
            if labels or len(line) < SPARSE:
                place = _free_place(x, y, 7 * len(text), taken) if text else (x, y)
                shown, said = text if place else "", f"{text or f'{value[0]:g}'}: {value[1]:.4g}"
                marks.append(Mark(x, y, shown, *(place or (x, y)), said, best == (name, i)))
        drawn.append(Drawn(name, color, " ".join(f"{x},{y}" for x, y in at), marks, line[-1][1]))
    return Chart(title, x_name, drawn, x_axis.ticks(), y_axis.ticks(), y_axis.log)


def _free_place(
    x: float, y: float, width: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float] | None:
    """Where a text of this width stands beside a point without lying on another one, and notes it as taken."""
    for dx, dy in ((9, -7), (9, 15), (-9, -7), (-9, 15), (12, 4), (-12, 4)):
        left = x + dx - (width if dx < 0 else 0)
        if all(left > end or left + width < start or abs(y + dy - other) > 12 for start, end, other in taken):
            taken.append((left, left + width, y + dy))
            return round(x + dx, 1), round(y + dy, 1)
    return None


def history(run: Path, x_name: str) -> dict[str, Line]:
    """name -> its values over x_name (step, samples_seen) in a run's metrics.jsonl. What is not finite is left out, and what is
    a part of another score."""
    path = run / "metrics.jsonl"
    lines: dict[str, Line] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        if not (text.startswith("{") and text.endswith("}")):
            continue  # cut off by a kill, or being written
        row = json.loads(text)
        for name, value in row.items():
            if name not in ("step", "samples_seen") and value is not None:
                lines.setdefault(name, []).append((row[x_name], value))
    return {name: thinned(line) for name, line in lines.items() if LEVEL.search(name) or not is_part(name, lines)}


def thinned(line: Line) -> Line:
    """Means of neighbors, at most POINTS."""
    if len(line) <= POINTS:
        return line
    return [tuple(part.mean(axis=0).tolist()) for part in np.array_split(np.array(line, dtype=float), POINTS)]


class Picture(NamedTuple):
    """A picture inside the page. pixelated: it is so small that its pixels are shown as squares."""

    source: str
    caption: str
    pixelated: bool
    note: str = ""


def picture(of: Kept, note: str = "") -> Picture:
    image = Image.open(io.BytesIO(of.png), formats=("PNG",))
    data, kind = of.png, "png"
    if max(image.size) > SMALL:
        image.thumbnail((SHOWN, SHOWN))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=88)
        data, kind = file.getvalue(), "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(source, of.caption, max(image.size) <= SMALL, note)


def pictures(result: Result, indices: Iterable[int], notes: Mapping[int, str] | None = None) -> list[Picture]:
    """Those of a result's pictures that are kept."""
    found = kept(result.folder / "pictures", indices)
    return [picture(each, (notes or {}).get(each.index, "")) for each in found]


def readable(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config or protocol with names of classes in place of their paths."""
    out = {}
    for key, value in flat.items():
        node, _, leaf = key.rpartition(".")
        if leaf == "_target_":
            out[node] = str(value).rpartition(".")[2]
        elif leaf != "_partial_":
            out[key] = value
    return out


def split(dicts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Of flat dicts: what all have alike, and for each key that differs its values in order, None where one lacks it."""
    keys = dict.fromkeys(key for each in dicts for key in each)
    values = {key: [each.get(key) for each in dicts] for key in keys}
    alike = {key: row[0] for key, row in values.items() if all(value == row[0] for value in row)}
    return alike, {key: row for key, row in values.items() if key not in alike}


class Row(NamedTuple):
    """Of a table of scores. arrow: which way is better; cells: (value, half the interval, better than every other)."""

    name: str
    arrow: str
    cells: list[tuple[str, str, bool]]
    part: bool


def direction(name: str) -> int:
    """1: larger is better; -1: smaller is; 0: neither."""
    return 1 if name.startswith(HIGHER) else -1 if name.startswith(LOWER) else 0


def rows(results: Sequence[Result]) -> list[Row]:
    """A cell wins when it is better than every other made like it (sampled, reconstructed ...) by more than the interval of
    their difference."""
    every, out = names(results), []
    for name in every:
        found = [
            Score(result.metrics.get(name), result.metrics.get(f"{name}/ci95"), result.protocol.get("made"))
            for result in results
        ]
        sign = direction(name)
        cells = [
            (*own.shown(), own.beats([each for j, each in enumerate(found) if j != i], sign))
            for i, own in enumerate(found)
        ]
        out.append(Row(name, {1: "↑", -1: "↓", 0: ""}[sign], cells, is_part(name, every)))
    return out


def is_part(name: str, every: Iterable[str]) -> bool:
    """Whether a value is one of those that a larger one is made of, such as one attribute's, or a spread."""
    family, _, last = name.rpartition("/")
    return last == "std" or last.isdigit() or (last != "all" and f"{family}/all" in every)


class Score(NamedTuple):
    """One cell's value, half its interval, and how its pictures were made."""

    value: float | None
    spread: float | None
    made: str | None

    def shown(self) -> tuple[str, str]:
        """The value, to the digits that half the interval has, and that half."""
        if self.value is None:
            return "", ""
        spread = self.spread if self.spread is not None and math.isfinite(self.spread) else None
        digits = 1 - math.floor(math.log10(spread)) if spread else None
        value = f"{self.value:.4g}" if digits is None or digits > 6 else f"{self.value:.{max(0, digits)}f}"
        return value, "" if spread is None else f"{spread:.2g}"

    def beats(self, others: "Sequence[Score]", sign: int) -> bool:
        """No score without an interval beats, or is beaten."""
        rivals: list[Any] = [other for other in others if other.made == self.made and other.value is not None]
        if not rivals or self.value is None or self.spread is None or None in [other.spread for other in rivals]:
            return False
        return all(sign * (self.value - other.value) > math.hypot(self.spread, other.spread) for other in rivals)
