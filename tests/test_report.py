"""The page as a person sees it: in a real browser, on a phone and on a desk."""

import json
import re
import shutil
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, Tab, needs_browser, opened
from evaluated import BEST, CAPTIONS, EVIL, STEP, sampled, scored
from markupsafe import escape

from ldm.evaluation import report
from ldm.evaluation.scoring import Round

SCALES = (0.5, BEST, 3.0, 6.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a <b>run"
    scored(run, [sampled(4.0)], n=12)  # of fewer captions: another table
    real = Round("real", sampled(BEST).make, {"made": "real", "others": {"captions": "x", "reference": "y"}})
    scored(run, [real, *(sampled(scale) for scale in SCALES)])
    return run


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "evaluation" / "report.html").read_text().replace("<wbr>", "")


def assert_sound(tab: Tab, path: Path) -> None:
    """No error, nothing asked for but the page, nothing to scroll sideways, every picture there."""
    assert tab.problems == []
    assert tab.requests == [path.resolve().as_uri()]
    assert tab.overflow() == 0
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert tab.page.evaluate(broken) == 0


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_opens_from_disk_and_fits(run: Path, width: int):
    path = run / "evaluation" / "report.html"
    with opened(path, width, dark=width == PHONE) as tab:
        assert_sound(tab, path)
        text = tab.page.inner_text("body")
        for each in ("a <b>run", f"step {STEP}", "20 captions", "frechet/pixels1", "caption_accuracy/all", "±",
                     "best frechet/pixels1", "Worst and best by caption_accuracy", "Protocol", "guidance 6", EVIL,
                     "Other scores of this checkpoint", "n is 12, above 20", "train/loss"):  # fmt: skip
            assert each in text
        assert "ldm.a.Module" not in text  # folded away
        tab.page.click("summary:text('config.yaml')")
        assert "ldm.a.Module" in tab.page.inner_text("body")
        assert tab.overflow() == 0
        small = tab.page.evaluate("Math.min(...[...document.querySelectorAll('td, th, p, figcaption')]"
                                  ".map(e => parseFloat(getComputedStyle(e).fontSize)))")  # fmt: skip
        assert small >= 12


def test_nothing_comes_from_elsewhere_and_captions_are_only_text(html: str):
    tags = html.replace(str(escape(EVIL)), "")
    assert "color-mix" in tags  # most of it is still there
    assert not re.search(r"<script|(src|href)=[\"']?(?![\"']|data:)|url\(|@import", tags)
    assert "&lt;script&gt;console.error" in html
    assert "{{ 7 * 7 }}" in html


@needs_browser
def test_the_best_point_of_the_sweep_is_the_lowest_and_its_pictures_are_shown(run: Path):
    with opened(run / "evaluation" / "report.html") as tab:
        sweep = tab.page.locator("h2:text('The sweep') + .charts")
        heights = [float(c.get_attribute("cy")) for c in sweep.locator("circle:not(.best)").all()]
        assert len(heights) == len(SCALES)
        assert float(sweep.locator("circle.best").get_attribute("cy")) == max(heights)
        assert sweep.locator("circle:not(.best) title").nth(1).inner_html().startswith("2.0: ")
        assert tab.page.locator("h2:text('Samples of guidance 2') ~ .gallery").first.locator("figure").count() == 16
        matrix = tab.page.locator("table.matrix")
        assert matrix.locator("thead td").all_inner_texts()[1:] == [f"guidance {scale:g}" for scale in SCALES]
        assert matrix.locator("tbody tr").count() == 6
        assert matrix.locator("tbody th").first.inner_text() == EVIL


def test_worst_and_best_are_in_order(run: Path):
    (folder,) = (run / "evaluation").glob("step30-guidance6-*")
    scores = json.loads((folder / "samples.json").read_text())["caption_accuracy"]
    ((name, worst, best),) = report.extremes(report.Result.read(folder))
    assert name == "caption_accuracy"
    ranked = sorted(range(len(scores)), key=lambda i: scores[i])
    assert [picture.caption for picture in worst] == [CAPTIONS[i] for i in ranked[:8]]
    assert [picture.note for picture in best] == [f"{scores[i]:.3g}" for i in ranked[:-9:-1]]
    assert float(worst[0].note) < float(best[0].note)


def test_the_best_setting_counts_as_more_only_beyond_the_intervals(html: str):
    row = next(line for line in html.split("<tr>") if line.startswith('<th scope="row">caption_accuracy/all'))
    cells = re.findall(r"<td( class=\"wins\")?>", row)
    assert cells == ["", "", ' class="wins"', "", ""]  # real pictures are no rival


def test_training_curves_leave_out_what_is_not_finite_and_group_what_is_alike(run: Path):
    charts = {chart.title: chart for chart in report.training_charts(report.history(run, "step"))}
    assert charts.keys() == {"loss", "loss_level", "loss_sigma", "accuracy/all"}
    assert len(charts["loss_sigma"].lines) == 2
    train, val = charts["loss"].lines
    assert (train.name, val.name) == ("train/loss", "val/loss")
    points = [tuple(map(float, point.split(","))) for point in train.points.split()]
    assert len(points) == STEP - 1
    assert points == sorted(points)  # to the right, and downwards: SVG counts from the top
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert len(val.marks) == 3


def test_a_page_without_pictures_training_or_a_config(tmp_path: Path):
    run = tmp_path / "bare"
    scored(run, [sampled(1.0)])
    for path in (run / "evaluation").glob("*/pictures"):
        shutil.rmtree(path)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).unlink()
    html = report.write(run / "evaluation", STEP).read_text().replace("<wbr>", "")
    assert "frechet/pixels1" in html
    assert not re.search("<img|The sweep|Samples of|Training|Configuration|Worst", html)


@needs_browser
def test_pictures_of_many_pixels_are_shown_smaller(tmp_path: Path):
    import torch

    from ldm.evaluation.generate import generate
    from ldm.evaluation.page import pictures

    images = torch.rand(2, 3, 512, 384) * 2 - 1
    list(generate(lambda captions, index: images[index], ["a", "b"], 2, tmp_path / "pictures"))
    (large, _) = pictures(report.Result("", {}, {}, {}, tmp_path), [0, 1])
    assert large.source.startswith("data:image/jpeg")
    assert len(large.source) < 80_000
    page = tmp_path / "page.html"
    page.write_text(f'<img src="{large.source}">')
    with opened(page) as tab:
        assert tab.page.evaluate("[document.images[0].naturalWidth, document.images[0].naturalHeight]") == [192, 256]
