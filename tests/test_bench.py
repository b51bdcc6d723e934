"""The measurements run, at toy size, on what they say: the same network on both sides. Their figures mean nothing here."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ROOT

measuring = pytest.importorskip("measuring")
peers = pytest.importorskip("peers")  # needs diffusers, a development dependency
import check  # noqa: E402
import sample  # noqa: E402
import startup  # noqa: E402
import train_step  # noqa: E402

import evaluate  # noqa: E402


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *words: str
) -> str:
    monkeypatch.setattr(sys, "argv", [f"bench/{main.__module__}.py", *words])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("v2", [False, True])
def test_both_sides_train_the_same_network(v2: bool):
    ours, theirs = peers.unets("toy", v2)
    latents, text = train_step.inputs("toy", 2)
    steps = torch.tensor([3.0, 900.0])
    cond = sample.Conditioning(text, torch.ones(text.shape[:2], dtype=torch.bool), torch.zeros(2, 0))
    expected = theirs(latents, steps, text).sample
    torch.testing.assert_close(ours(latents, steps, cond), expected, rtol=1e-3, atol=1e-4)
    assert expected.std() > 0.01


def test_both_sides_take_the_whole_step():
    for side in train_step.SIDES:
        recipe = train_step.recipe(side, "toy")
        unet = recipe.module.denoiser.backbone if side == "ours" else recipe.unet
        before = unet.state_dict()["out.2.weight" if side == "ours" else "conv_out.weight"].clone()
        seconds = recipe.step(*train_step.inputs("toy", 2))
        assert list(seconds) == train_step.GROUPS["step"]
        after = unet.state_dict()["out.2.weight" if side == "ours" else "conv_out.weight"]
        assert not torch.equal(before, after)
        average = recipe.ema.weights.values() if side == "ours" else recipe.ema.shadow_params
        assert len(list(average)) == len(list(unet.parameters()))
        assert all(p.grad is None for p in unet.parameters())


def test_train_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        train_step, "peaks", lambda *given: [train_step.memory(s, "toy", 2) / 2**20 for s in train_step.SIDES]
    )
    out = run(capsys, monkeypatch, train_step.main, "--toy", "--rounds=2", "--batch=2")
    for part in ("forward", "clip + optimizer + EMA", "step", "peak memory, MiB"):
        assert f"\n| {part} |" in out
    assert "    python bench/train_step.py --toy --rounds=2 --batch=2" in out.replace(f"{ROOT}/", "")


def test_sample_draws_the_pipelines_pictures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    rows, difference = sample.measure("toy", batch=2, steps=3, rounds=1)
    assert difference < 1e-4
    assert all(row["network"] > 0 and row["outside"] > 0 for side in rows.values() for row in side)
    out = run(capsys, monkeypatch, sample.main, "--toy", "--steps=2", "--rounds=1")
    assert "| share outside the network, % |" in out


def test_evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    out = run(capsys, monkeypatch, evaluate.main, "--toy")
    assert all(f"\n| {part} |" in out for part in (*evaluate.NETWORKS, "text encoder", "whole"))
    assert "overhead: " in out


def test_startup_knows_a_command_that_ends_otherwise():
    words, _, _ = startup.QUICK["a refused key, trainer.max_step=5"]
    assert 0 < startup.seconds(words, 2) < 60
    with pytest.raises(AssertionError, match="max_step"):
        startup.seconds(words, 0)


@pytest.mark.parametrize(("value", "code"), [(1.04, 0), (1.06, 1)])
def test_check_fails_past_the_margin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float, code: int
):
    names = ("training", "sampling", "evaluation", "reading", "starting")
    for name in names:
        monkeypatch.setattr(check, name, lambda _, name=name: [(name, value if name == "reading" else 0.5, 1.0)])
    with pytest.raises(SystemExit) as end:
        run(capsys, monkeypatch, check.main)
    assert end.value.code == code
    assert capsys.readouterr().out.count("TOO MUCH") == code


def test_checks_measure_what_they_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_step, "peaks", lambda *given: [1.0, 2.0])
    values = [*check.training("toy"), *check.sampling("toy"), *check.evaluation("toy")]
    assert len(values) == 6
    assert all(0 < value < 1000 for _, value, _ in values)
    assert values[2] == ("training, peak memory: ours / diffusers", 0.5, 1.0)


def test_a_process_of_its_own_gives_its_last_line(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('noise')\nprint(sys.argv[1:])")
    assert measuring.in_a_process(str(script), "a", "b") == "['a', 'b']"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError):
        measuring.in_a_process(str(script))


def test_sides_run_in_turn():
    seen: list[str] = []
    rows = measuring.alternately({name: lambda name=name: seen.append(name) or {"s": len(seen)} for name in "ab"}, 2)
    assert "".join(seen) == "abbaab"
    assert rows == {"a": [{"s": 4}, {"s": 5}], "b": [{"s": 3}, {"s": 6}]}
    assert measuring.ratio([1, 4], [2, 2]) == 1.25
