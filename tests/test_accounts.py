"""Tally and key log."""

import json
from pathlib import Path

import pytest

from ldm.data.accounts import KeyLog, Tally, write_report
from ldm.errors import UserError


def tally(budget: float = 0.01, delivered: int = 0, **dropped: int) -> Tally:
    out = Tally(budget)
    out.add(
        delivered,
        {k.replace("_", "/"): n for k, n in dropped.items()},
        {k.replace("_", "/"): f"s: {k}" for k in dropped},
    )
    return out


def test_the_budget() -> None:
    tally(delivered=10, image_truncated=10).check()  # too few to be a share
    tally(delivered=9900, image_truncated=100).check()
    tally(delivered=10, filter_size=5000).check()
    with pytest.raises(
        UserError,
        match=r"^101 of 10001 samples .* data.budget=0.01 allows; .* 'image/truncated' \(100\), the last at s: image_truncated;",
    ):
        tally(delivered=9900, image_truncated=100, image_empty=1).check()
    with pytest.raises(UserError, match=r"^1 of 1 samples"):
        tally(0.0, 0, image_empty=1).check()
    with pytest.raises(UserError, match=r"data.budget=2; "):
        Tally(2)


def test_sums_and_reports(tmp_path: Path) -> None:
    total = tally(delivered=3, a_b=1) + tally(delivered=4, a_b=2, c_d=1)
    write_report(total, tmp_path)
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report == {
        "delivered": 7,
        "dropped": {"a/b": 3, "c/d": 1},
        "last_dropped": {"a/b": "s: a_b", "c/d": "s: c_d"},
    }
    assert Tally.from_report(report, 0.01).report() == report
    assert [path.name for path in tmp_path.iterdir()] == ["data_report.json"]


def test_the_key_log_goes_on_from_a_step_on_fewer_ranks(tmp_path: Path) -> None:
    logs = [KeyLog(tmp_path / "keys", rank, 2, 0) for rank in range(2)]
    for step in (1, 2, 3):
        for rank, log in enumerate(logs):
            log.write(step, [f"{step}{rank}"])
    with (tmp_path / "keys" / "rank0.jsonl").open("a") as file:
        file.write('{"step": 4, "ke')  # a kill in the middle of a line
    KeyLog(tmp_path / "keys", 0, 1, 2).write(3, ["x", "y"])
    rows = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "keys").iterdir()}
    assert rows == {
        "rank0": [{"step": 1, "keys": ["10"]}, {"step": 2, "keys": ["20"]}, {"step": 3, "keys": ["x", "y"]}],
        "rank1": [{"step": 1, "keys": ["11"]}, {"step": 2, "keys": ["21"]}],
    }
