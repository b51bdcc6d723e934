"""Runs side by side: as tables, as JSON, and as a page in a real browser."""

import json
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, needs_browser, opened
from evaluated import EVIL, STEP, sampled, scored
from test_cli import run as ldm  # noqa: F401
from test_report import assert_sound

from ldm.errors import UserError
from ldm.evaluation import compare
from ldm.evaluation.scoring import Round


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """`better` is nearer to the reference at guidance 2; both were scored at 3 too, with another number of captions."""
    folder = tmp_path_factory.mktemp("runs")
    reconstruction = Round("reconstruction", sampled(2.0).make, {"made": "reconstruction"})
    worse = {
        "model": {"lr": 0.1, "solver": {"_target_": "ldm.a.Euler"}},
        "logger": {"_target_": "a.WandbLogger", "tags": []},
    }
    better = {"model": {"lr": 0.2, "solver": {"_target_": "ldm.a.Heun"}}}
    scored(folder / "worse", [sampled(2.0, shift=0.9), reconstruction, sampled(3.0)], seed=0, **worse)
    faster = sampled(2.0)
    faster.protocol["sampling"]["steps"] = 2
    scored(folder / "better", [faster, reconstruction, sampled(5.0)], seed=0, **better)
    scored(folder / "better", [sampled(3.0)], n=12, seed=0, **better)
    return [folder / "worse", folder / "better"]


@pytest.fixture(scope="module")
def found(folders: list[Path]) -> compare.Comparison:
    return compare.compare(folders)


def test_only_what_differs_of_the_configuration_is_there(found: compare.Comparison):
    assert found.config == {"model.lr": [0.1, 0.2], "model.solver": ["Euler", "Heun"], "logger": ["WandbLogger", None]}


def test_scores_stand_side_by_side_only_when_they_compare(found: compare.Comparison):
    assert [group.label for group in found.groups] == ["guidance 2", "reconstruction"]
    first, second = found.groups
    assert [result.label for result in first.results] == ["worse", "better"]
    assert first.made == {"sampling.steps": [3, 2]}
    assert second.made == {}
    assert second.results[0].metrics == second.results[1].metrics
    said = list(compare.sentences(found))
    assert len(said) == 3
    assert any(line.startswith("guidance 3: worse and better differ in n: 20 and 12; captions: ") for line in said)
    assert "guidance 5: only better has it" in said


def test_runs_without_scores_and_of_one_name(folders: list[Path], tmp_path: Path):
    bare = tmp_path / "better"
    bare.mkdir()
    (bare / "config.yaml").write_text("{name: better, run_dir: elsewhere, seed: 0}")
    found = compare.compare([folders[1], bare])
    assert found.groups == []
    assert list(compare.sentences(found)) == [f"{bare} has no scores: python evaluate.py checkpoint={bare}"]
    assert "seed" not in found.config
    assert found.config["model.lr"] == [0.2, None]
    compare.write(found, tmp_path / "page.html")
    assert "No two of them compare" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_compared_is_one_line(folders: list[Path], tmp_path: Path):
    with pytest.raises(UserError, match=r"there is nothing to compare .* with; give two runs or more"):
        compare.compare(folders[:1])
    with pytest.raises(UserError, match=r"there is no run in .*nowhere \(no config.yaml\)"):
        compare.compare([folders[0], tmp_path / "nowhere"])


def test_the_command_prints_tables_json_and_writes_a_page(ldm, folders: list[Path], tmp_path: Path):  # noqa: F811
    out = tmp_path / "compare.html"
    code, shown, _ = ldm("compare", *folders, "--out", out)
    assert code == 0
    for each in ("model.lr", "Euler", "guidance 2, n=20", "sampling.steps: 3, 2", "frechet/pixels1", "±",
                 "not compared: guidance 5: only better has it", "compare.html"):  # fmt: skip
        assert each in shown
    assert out.is_file()
    code, shown, _ = ldm("compare", *folders, "--json")
    facts = json.loads(shown)
    assert facts["runs"]["worse"] == {"folder": str(folders[0]), "step": STEP}
    assert facts["config"]["model.lr"] == {"worse": 0.1, "better": 0.2}
    scores = facts["scores"][0]
    assert scores["made_differently"] == {"sampling.steps": {"worse": 3, "better": 2}}
    assert scores["metrics"]["better"]["frechet/pixels1"] < scores["metrics"]["worse"]["frechet/pixels1"]
    assert {each["label"] for each in facts["not_compared"]} == {"guidance 3", "guidance 5"}
    assert ldm("compare", folders[0])[0] == 2


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_opens_from_disk_and_fits(found: compare.Comparison, tmp_path: Path, width: int):
    path = tmp_path / "compare.html"
    compare.write(found, path)
    with opened(path, width) as tab:
        assert_sound(tab, path)
        text = tab.page.inner_text("body")
        tab.page.click("summary:text('more, of how they are logged')")
        text += tab.page.inner_text("details")
        for each in ("2 runs side by side", "WandbLogger",
                     "model.lr", "Heun", "guidance 2", "Made differently", "sampling.steps", EVIL,
                     "guidance 5: only better has it", "samples seen", "train/loss"):  # fmt: skip
            assert each in text
        matrix = tab.page.locator("table.matrix").first
        assert matrix.locator("thead td").all_inner_texts()[1:] == ["worse", "better"]
        assert matrix.locator("tbody img").count() == 12
        row = tab.page.locator("tr", has=tab.page.locator("th:text('caption_accuracy/all')")).first
        assert row.locator("td.wins").count() == 1
        assert "wins" in row.locator("td").nth(1).get_attribute("class")
        charts = tab.page.locator(".chart").all()
        assert [chart.locator("polyline").count() for chart in charts] == [2, 2, 2]


def test_pictures_of_other_noise_do_not_stand_side_by_side(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 1)):
        scored(tmp_path / name, [sampled(2.0, seed=seed)])
    found = compare.compare([tmp_path / "a", tmp_path / "b"])
    assert found.groups[0].made == {"seed": [0, 1]}
    compare.write(found, tmp_path / "page.html")
    assert "<img" not in (tmp_path / "page.html").read_text()
