import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytorch_lightning.loggers import WandbLogger
from tiny import latent_diffusion

from ldm.training import session


def banner(capsys: pytest.CaptureFixture[str], step: int, loggers: tuple = ()) -> str:
    module = latent_diffusion()
    trainer = SimpleNamespace(max_steps=2000, world_size=4, precision="bf16-mixed", loggers=loggers)
    session.banner("flow", Path("runs/flow"), module, SimpleNamespace(batch_size=64), trainer, step)
    return capsys.readouterr().out


def test_the_banner_says_what_how_long_and_where(capsys: pytest.CaptureFixture[str]):
    first, second, third = banner(capsys, 0).splitlines()
    assert first.startswith("flow: LatentDiffusionModule, 0.0")
    assert first.endswith("M frozen")
    assert second == "  2000 steps, 128,000 samples; global batch 64 on 4 rank(s), bf16-mixed"
    assert third == "  runs/flow: starts at step 0"


def test_the_banner_of_a_run_that_goes_on_or_is_complete(capsys: pytest.CaptureFixture[str]):
    assert "runs/flow: continues from step 500" in banner(capsys, 500)
    assert "runs/flow is complete at step 2000: nothing to do" in banner(capsys, 2000)


@pytest.mark.parametrize(
    ("url", "line"),
    [("https://wandb.ai/x", "  W&B: https://wandb.ai/x"), (None, "  W&B: offline in runs/flow/wandb; `wandb sync` up")],
)
def test_the_banner_says_where_weights_and_biases_has_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str | None, line: str
):
    monkeypatch.setattr(WandbLogger, "experiment", SimpleNamespace(url=url))
    assert line in banner(capsys, 0, (WandbLogger(offline=True),))


def test_the_farewell_repeats_the_last_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = ['{"step": 1, "val/psnr": 9}', '{"step": 2, "val/kl": 0.5, "val/psnr": 20.12345}', '{"step": 3, "lr": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "samples").mkdir()
    for name in ("step_00000001.png", "step_00000002.png"):
        (tmp_path / "samples" / name).touch()
    session.farewell(tmp_path, SimpleNamespace())
    first, second = capsys.readouterr().out.splitlines()
    assert first == "  validation at step 2: psnr 20.12, kl 0.5"
    assert second == f"  pictures: {tmp_path}/samples/step_00000002.png"


def test_the_farewell_of_an_empty_run_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    session.farewell(tmp_path, SimpleNamespace())
    assert capsys.readouterr().out == ""


def test_quiet_silences_lightning_s_advice():
    session.quiet()
    assert not logging.getLogger("pytorch_lightning").isEnabledFor(logging.INFO)


def test_a_line_is_said_once_for_all_ranks_and_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    session.say("runs/[x]: " + "long " * 60)
    assert capsys.readouterr().out == "  runs/[x]: " + "long " * 60 + "\n"
    monkeypatch.setattr(session.rank_zero_only, "rank", 1)
    session.say("not from here")
    session.complain("from any rank")
    got = capsys.readouterr()
    assert (got.out, got.err) == ("", "error: from any rank\n")
