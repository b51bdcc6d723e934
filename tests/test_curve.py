from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation import curve
from ldm.evaluation.curve import tradeoff, tradeoff_curve
from ldm.evaluation.results import Result

LINES = {"": [("1", 0.22, 30.0), ("3", 0.25, 15.5), ("8", 0.26, 21.0)]}


def has(image: Image.Image, color: str) -> bool:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(np.asarray(image).astype(int) - wanted).sum(axis=2) < 12).any())


def test_the_lowest_distance_is_marked_and_named(monkeypatch: pytest.MonkeyPatch):
    titles = []
    original = curve.Figure.subplots

    def subplots(self: curve.Figure) -> object:
        axes = original(self)
        set_title = axes.set_title
        monkeypatch.setattr(axes, "set_title", lambda text, **k: titles.append(text) or set_title(text, **k))
        return axes

    monkeypatch.setattr(curve.Figure, "subplots", subplots)
    image = tradeoff_curve(LINES, "clip_cosine/clip_l", "frechet/inception", "guidance")
    assert titles == ["best frechet/inception: 15.5 at guidance 3"]
    assert image.mode == "RGB"
    assert has(image, curve.BEST)
    two = {"steps 10": LINES[""], "steps 50": [("3", 0.27, 12.25)]}
    tradeoff_curve(two, "clip_cosine/clip_l", "frechet/inception", "guidance")
    assert titles[1] == "best frechet/inception: 12.25 at guidance 3, steps 50"


def result(swept: dict[str, float], **metrics: float) -> Result:
    return Result("", swept, {}, {"frechet/inception": 10.0 + sum(swept.values()), **metrics}, Path())


def test_the_newest_sweep_is_drawn_where_others_had_other_axes_or_scores():
    guidance = [result({"guidance": scale}, **{"clip_cosine/clip_l": 0.1 * scale}) for scale in (1.0, 2.0)]
    steps = [result({"steps": n}) for n in (10, 20)]
    found = tradeoff([*guidance, *steps])
    assert (found.swept, [point[0] for point in found.lines[""]]) == ("steps", ["10", "20"])
    found = tradeoff([*guidance, result({"guidance": 3.0})])  # one of them without the score of the others
    assert [point[0] for point in found.lines[""]] == ["1.0", "2.0"]
    assert tradeoff(guidance[:1]) is None
