import os
from pathlib import Path

from evaluated import STEP, sampled, scored

from ldm.evaluation.results import Result, grouped, newest


def test_results_are_read_back_as_they_were_given_newest_first(tmp_path: Path):
    given = scored(tmp_path / "run", [sampled(2.0), sampled(3.0)])
    evaluation = tmp_path / "run" / "evaluation"
    for i, result in enumerate(given):
        os.utime(result.folder / "results.json", (i, i))
    assert newest(evaluation) == given[::-1]
    assert len(given[0].samples()["caption_accuracy"]) == 20
    older = evaluation / f"step{STEP - 1}-guidance2-aaaaaaaa"
    older.mkdir()
    (older / "results.json").write_text('{"protocol": {"id": "x"}, "metrics": {"a": 1}}')
    assert newest(evaluation) == given[::-1]
    assert newest(evaluation, STEP - 1) == [Result("guidance2", {}, {"id": "x"}, {"a": 1}, older)]
    assert newest(tmp_path / "nowhere") == []


def test_groups_hold_what_compares():
    def result(label: str, **protocol: object) -> Result:
        return Result(label, {}, protocol, {}, Path())

    a, b, c, d = result("a", n=5), result("b", n=6), result("c", n=5, seed=1), result("d", n=6)
    assert grouped([a, b, c, d]) == [[a, c], [b, d]]
