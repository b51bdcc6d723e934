"""The building blocks of pages: axes, charts, pictures, what agrees and what differs."""

import json
import math
from pathlib import Path

import pytest

from ldm.evaluation import page
from ldm.evaluation.page import Axis, Score, chart, history, readable, rows, split, thinned
from ldm.evaluation.results import Result


def test_an_axis_places_values_and_ticks():
    axis = Axis.of([0.0, 100.0], 0.0, 108.0, True)
    assert [axis(-4.0), axis(0.0), axis(104.0)] == [0.0, 4.0, 108.0]
    ticks = axis.ticks()
    assert [text for _, text in ticks] == ["0", "25", "50", "75", "100"]
    assert all(at == axis(float(text)) for at, text in ticks)
    assert [text for _, text in Axis.of([0.25, 0.5], 0, 100, True).ticks()] == ["0.3", "0.4", "0.5"]
    assert [text for _, text in Axis.of([0, 2e6], 0, 100, False).ticks()] == ["0", "500k", "1M", "1.5M", "2M"]


def test_ticks_of_small_and_negative_values():
    assert [text for _, text in Axis.of([-0.1, 0.1], 0, 100, True).ticks()] == [
        "-0.10",
        "-0.05",
        "0.00",
        "0.05",
        "0.10",
    ]
    assert [text for _, text in Axis.of([0, 4e-7], 0, 100, True).ticks()] == ["0", "1e-07", "2e-07", "3e-07", "4e-07"]


def test_values_over_many_decades_are_on_a_logarithmic_axis():
    axis = Axis.of([1e-4, 1.0], 0.0, 100.0, True)
    assert axis.log
    assert axis(1e-2) == pytest.approx(50, abs=0.1)
    assert {text for _, text in axis.ticks()} == {"0.0001", "0.001", "0.01", "0.1", "1"}
    assert not Axis.of([0.0, 1.0], 0, 100, True).log
    assert not Axis.of([1e-4, 1.0], 0, 100, False).log


def test_a_constant_has_an_axis():
    low, high = (Axis.of([value], 0, 100, True) for value in (0.0, 3.0))
    assert low(0.0) == high(3.0) == 50


def test_texts_of_points_do_not_lie_on_each_other():
    drawn = chart("t", {"": [(0.0, 0.0), *[(1.0, 1.0)] * 9]}, "x", {"": [f"s{i}" for i in range(10)]})
    marks = drawn.lines[0].marks
    assert len(marks) == 10
    shown = [mark for mark in marks if mark.text]
    assert 4 <= len(shown) < 10  # the others have their titles
    assert len({(mark.text_x, mark.text_y) for mark in shown}) == len(shown)
    assert marks[9].title == "s9: 1"


def test_a_line_that_is_left_out_keeps_its_color_for_none():
    drawn = chart("t", {"a": [], "b": [(0, 1), (1, 2)]}, "x")
    assert [(line.name, line.color) for line in drawn.lines] == [("b", 1)]


def test_long_histories_are_averaged(tmp_path: Path):
    rows = [{"step": i, "samples_seen": 4 * i, "a": i % 2} for i in range(1, 3001)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line = history(tmp_path, "samples_seen")["a"]
    assert len(line) == page.POINTS
    assert line[0] == (pytest.approx(4 * 5.5), 0.5)
    assert thinned([(1, 2.0)]) == [(1, 2.0)]
    assert history(tmp_path / "none", "step") == {}


def test_what_agrees_and_what_differs():
    alike, differ = split([{"a": 1, "b": 2}, {"a": 1, "c": None, "b": 3}, {"a": 1, "b": 3}])
    assert alike == {"a": 1, "c": None}
    assert differ == {"b": [2, 3, 3]}
    assert readable({"a._target_": "ldm.x.Y", "a._partial_": True, "a.b": 1}) == {"a": "Y", "a.b": 1}


def test_a_score_beats_rivals_beyond_both_intervals_only():
    own = Score(1.0, 0.3, None)
    assert own.beats([Score(1.6, 0.4, None)], -1)
    assert not own.beats([Score(1.6, 0.4, None)], 1)
    assert not own.beats([Score(1.4, 0.4, None)], -1)
    assert own.beats([Score(1.6, 0.4, None), Score(0.1, 0.1, "real")], -1)
    assert not own.beats([Score(0.1, 0.1, "real")], -1)  # nobody to beat
    assert not own.beats([Score(1.6, None, None)], -1)
    assert not own.beats([Score(1.6, 0.4, None)], 0)


def test_a_score_is_shown_to_the_digits_of_its_interval():
    found = [Score(307.66, 50.77, None), Score(0.078123, 0.0663, None), Score(0.5, 0.0, None), Score(1 / 3, None, None),
             Score(2e-18, 7e-18, None), Score(None, None, None)]  # fmt: skip
    expected = [("308", "51"), ("0.078", "0.066"), ("0.5", "0"), ("0.3333", ""), ("2e-18", "7e-18"), ("", "")]
    assert [score.shown() for score in found] == expected


def test_rows_tell_scores_from_their_parts():
    metrics = {"kid/x": 1.0, "kid/x/std": 0.1, "caption_accuracy/all": 0.5, "caption_accuracy/all/ci95": 0.12345,
               "caption_accuracy/color": 0.6, "caption_accuracy/two/all": 0.1, "latent/mean/3": 0.1, "psnr": 20.0}  # fmt: skip
    found = rows([Result("a", {}, {}, metrics, Path()), Result("b", {}, {}, {"psnr": 21}, Path())])
    assert [row.name for row in found if row.part] == ["kid/x/std", "caption_accuracy/color", "latent/mean/3"]
    by_name = {row.name: row for row in found}
    assert by_name["caption_accuracy/all"].cells[0][:2] == ("0.50", "0.12")
    assert [by_name[name].arrow for name in ("kid/x", "psnr", "latent/mean/3")] == ["↓", "↑", ""]
    assert by_name["kid/x"].cells[1] == ("", "", False)


def test_a_score_whose_interval_is_not_a_number_is_shown_without_it():
    """Such as the results of other tools may have."""
    assert Score(math.inf, math.nan, "reconstruction").shown() == ("inf", "")


def test_a_line_that_a_kill_cut_off_is_left_out_of_the_history(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples_seen": 8, "train/loss": 0.5}\n{"step": 2, "samp')
    assert history(tmp_path, "step") == {"train/loss": [(1, 0.5)]}
