import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import WandbLogger
from tiny import latent_diffusion

from ldm.data.datamodule import ShardDataModule
from ldm.data.decode import DecodeSample
from ldm.data.filters import CaptionLength, SmallestSide
from ldm.training import session
from ldm.training.ema import EMA
from ldm.training.optim import WarmupCosine
from ldm.training.power_ema import PowerEMA


def lines(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shards: str,
    step: int = 0,
    source: str | None = None,
    **changes: Any,
) -> dict[str, str]:
    """The banner's first line under "", then its rows by name."""
    monkeypatch.setenv("COLUMNS", "150")
    decode = DecodeSample(8, filters={"size": SmallestSide(2, True), "words": CaptionLength(1, 9)})
    data = ShardDataModule(
        shards=shards, val_shards=shards, decode=decode, side=8, batch_size=64, steps=2000, seed=0, val_batch_size=8,
        run_dir="runs/flow",
    )  # fmt: skip
    trainer = {
        "max_steps": 2000, "world_size": 4, "accumulate_grad_batches": 2, "precision": "bf16-mixed", "loggers": [],
        "callbacks": [EMA(0.999), PowerEMA("runs/flow", [0.05, 0.1], 10)],
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
    }  # fmt: skip
    module = latent_diffusion(lr_schedule=WarmupCosine(100, 2000))
    session.banner("flow", Path("runs/flow"), module, data, SimpleNamespace(**trainer | changes), step, source)
    first, *rest = capsys.readouterr().out.splitlines()
    assert len(rest) < 23  # one screen
    assert max(map(len, rest)) <= 150
    starts = [i for i, line in enumerate(rest) if line[:3].strip()]
    said = [" ".join(" ".join(rest[a:b]).split()) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return {"": first} | {line.split()[0]: line.partition(" ")[2] for line in said}


def test_the_banner_says_what_on_what_how_long_and_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_shards: str
):
    said = lines(capsys, monkeypatch, tiny_shards)
    assert said[""] == "flow: LatentDiffusionModule"
    assert said["run"] == "runs/flow starts at step 0"
    assert said["batch"] == "64 = 8 x 2 accumulated x 4 ranks"
    assert said["steps"] == "2,000: 128,000 samples, 1.33e+03 epochs"
    assert said["precision"] == "bf16-mixed, on cpu"
    assert said["captions"] == "10% dropped, for guidance"
    assert said["average"] == "EMA of decay 0.999, PowerEMA of lengths 0.05, 0.1"
    assert said["data"].startswith("8 shards of 96 samples (")
    assert said["data"].endswith(" ...), 8 px, filters: size, words")
    assert said["W&B"] == "off"


def test_the_banner_s_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_shards: str):
    module = latent_diffusion()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters()) - trained
    said = lines(capsys, monkeypatch, tiny_shards)
    assert said["model"].startswith(f"{trained / 1e6:.3g}M parameters trained (conditioner ")
    assert said["model"].endswith(f"{frozen / 1e6:.3g}M frozen")
    assert said["rate"] == "Adam: 1e-05 at first, 0.001 after warm-up (100), 0.00054 half way, 6.8e-10 at last"
    total = 4 * (trained + frozen) + (4 + 8 + 3 * 4) * trained  # weights; gradients, two moments, three averages
    assert said["memory"].startswith(f"{total / 2**20:.1f} MB before activations: weights ")


@pytest.mark.parametrize(
    ("step", "source", "begins"),
    [
        (500, "runs/flow/checkpoints/step_00000500.ckpt", "continues from step 500 (step_00000500.ckpt)"),
        (
            2000,
            "runs/flow/checkpoints/step_00002000.ckpt",
            "is complete at step 2,000: nothing to do; raise trainer.max",
        ),
        (0, "runs/other", "starts at step 0, from the weights of runs/other"),
    ],
)
def test_the_banner_says_where_the_run_begins(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_shards: str,
    step: int,
    source: str,
    begins: str,
):
    assert lines(capsys, monkeypatch, tiny_shards, step, source)["run"].startswith(f"runs/flow {begins}")


@pytest.mark.parametrize(
    ("url", "line"),
    [("https://wandb.ai/x", "https://wandb.ai/x"), (None, "offline in runs/flow/wandb; `wandb sync` uploads it")],
)
def test_the_banner_says_where_weights_and_biases_has_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_shards: str, url: str | None, line: str
):
    monkeypatch.setattr(WandbLogger, "experiment", SimpleNamespace(url=url))
    assert lines(capsys, monkeypatch, tiny_shards, loggers=[WandbLogger(offline=True)])["W&B"] == line


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
