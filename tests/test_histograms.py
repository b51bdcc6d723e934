"""The picture of what shards hold: every shape of data gives one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.audit import Audit, Sample
from ldm.data.histograms import _edges, draw
from ldm.errors import UserError


def found(sizes: list[tuple[int, int]], scores: dict[str, list[float]]) -> Audit:
    samples = [Sample(str(i), i, i, width, height, 10 + i % 50, 3) for i, (width, height) in enumerate(sizes)]
    return Audit(samples=samples, scores=scores, shards=1)


@pytest.mark.parametrize("count", [1, 300])
def test_a_picture_for_few_and_for_many(tmp_path: Path, count: int):
    draw(found([(64, 64)] * count, {}), tmp_path / "a.png")
    draw(
        found([(64 + i, 9000) for i in range(count)], {"aesthetic": [5.0, 6.25], "punsafe": [0.0]}), tmp_path / "b.png"
    )
    a, b = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("a.png", "b.png"))
    assert b.shape[0] > a.shape[0]  # a row more
    assert min(a.std(), b.std()) > 10
    assert b[-200:, -200:].min() == 255  # two scores: the last place of the second row is blank


def test_bars():
    edges, gathers = _edges(np.array([1.0, 2, 3]))
    assert (edges.tolist(), gathers) == ([0.5, 1.5, 2.5, 3.5], None)
    edges, gathers = _edges(np.array([0.5, 0.5]))
    assert edges[0] == 0.5 < edges[-1]
    edges, gathers = _edges(np.array([*range(1000), 1_000_000], float))
    assert gathers is not None
    assert edges[-1] < 1100


def test_refusals(tmp_path: Path):
    with pytest.raises(UserError, match="no usable sample"):
        draw(Audit(), tmp_path / "a.png")
    with pytest.raises(UserError, match=r"does not end in \.png"):
        draw(found([(1, 1)], {}), tmp_path / "a.jpg")
