from pathlib import Path

import pytest

from ldm import config, config_help


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_help_is_two_screens_that_name_everything(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--help"])
    config.entry_point(script)(lambda cfg: pytest.fail("it ran"))()
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120
    names = [each.name for each in config_help.headers("experiment" if script == "train" else "protocol")]
    groups = [name for name in config_help.choices() if script == "train" or name.startswith(("metrics", "sampling"))]
    assert [name for name in [*names, *groups] if f"\n{name} " not in out] == []
    if script == "train":
        assert "6.5 min on 2 CPU cores" in out


def test_a_header_s_parts(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "# @package _global_\n# Something large\n# on two lines:\n#   python train.py experiment=a \\\n#     data.side=3\n"
        "# Cost: 3 days.\n# Expect: FID 3.5. Or so.\ndefaults:\n# not this\n"
    )
    found = config_help.header(tmp_path / "a.yaml")
    assert found.what == "Something large on two lines"
    assert found.command == "python train.py experiment=a data.side=3"
    assert (found.cost, found.expect) == ("3 days", "FID 3.5. Or so.")


def test_every_experiment_says_what_it_is_and_what_it_costs():
    for each in config_help.headers("experiment"):
        assert each.what, each.name
        assert each.cost, each.name
        assert each.expect, each.name
        assert f"experiment={each.name}" in each.command
