"""Stage one by its commands: a vector-quantized autoencoder against an adversary, resumed, scored, gated, fine-tuned."""

import json
from pathlib import Path

import pytest
import torch
from test_end_to_end import AUTOENCODER, Runs, assert_same_checkpoint, newest, runs  # noqa: F401
from tiny import here

GAN = ["model/autoencoder=vq_demo", "model.autoencoder.quantizer.codes=16", "model.penalty_weight=1",
       "model/adversary=bce_spectral", "model.adversary.start=1", "model.adversary.discriminator.channels=4",
       "model.adversary.discriminator.layers=1", "callbacks.checkpoint.every=1"]  # fmt: skip


def stage_one(folder: Path, data: list[str], name: str, *more: str) -> int:
    return here("train.py", *AUTOENCODER, *data, f"run_dir={folder}/{name}", *more)


@pytest.fixture(scope="module")
def gan(runs: Runs) -> Path:  # noqa: F811
    assert stage_one(runs.folder, runs.data, "gan", *GAN, "trainer.max_steps=4") == 0
    return runs.folder / "gan"


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(runs: Runs, gan: Path):  # noqa: F811
    for steps in (2, 4):
        schedule = ["trainer.max_steps=" + str(steps)]
        assert stage_one(runs.folder, runs.data, "gan_resumed", *GAN, *schedule) == 0
    assert_same_checkpoint(gan, runs.folder / "gan_resumed")
    state = newest(gan)["state_dict"]
    assert any(name.startswith("adversary.") for name in state)
    assert "autoencoder.quantize.share" in state  # the codebook's averages are kept


def test_its_pictures_and_latents_are_drawn(gan: Path):
    assert sorted(p.name for p in (gan / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    assert sorted(p.name for p in (gan / "latents").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    rows = [json.loads(line) for line in (gan / "metrics.jsonl").read_text().splitlines()]
    logged = set().union(*rows)
    assert {"train/discriminator", "train/adversary_scale", "train/codebook", "val/usage", "val/psnr"} <= logged
    assert "train/discriminator" not in rows[0]  # it begins at step 1


def test_it_is_scored(gan: Path):
    assert here("evaluate.py", f"checkpoint={gan}", "n=8", "batch_size=4") == 0
    (result,) = (gan / "evaluation").glob("step4-reconstruction-*/results.json")
    scores = json.loads(result.read_text())["metrics"]
    assert {"psnr", "ssim", "frechet/pixels4", "latent/kl", "latent/active", "latent/std/7"} <= scores.keys()


def test_stage_two_is_stopped_by_a_first_stage_that_is_not_good_enough(
    runs: Runs,  # noqa: F811
    gan: Path,
    capsys: pytest.CaptureFixture[str],
):
    def stage_two(require: str) -> str:
        demo = [f"model.first_stage.run={gan}", "trainer.max_steps=1", f"+model.first_stage.require={{{require}}}"]
        assert here("train.py", *runs.demo("gated"), *demo) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    here("evaluate.py", f"checkpoint={gan}", "n=8", "batch_size=4")
    capsys.readouterr()
    line = stage_two("psnr: 60")
    assert "has psnr " in line
    assert "wants at least 60 (measured: " in line
    assert "wants at most 0" in stage_two("frechet/pixels4: 0")
    assert "was not measured by it (measured: " in stage_two("rfid: 5")


def test_a_decoder_is_fine_tuned_on_latents_that_stay(runs: Runs):  # noqa: F811
    source = runs.folder / "autoencoder"
    tuned = ["model/autoencoder=fine_tuned", f"model.autoencoder.run={source}"]
    without = [word for word in AUTOENCODER if not word.startswith("model.autoencoder.channels")]
    for _ in range(2):  # the second has nothing to do, and says so
        words = [*without, *runs.data, f"run_dir={runs.folder}/tuned", *tuned]
        assert here("train.py", *words) == 0
    before, after = newest(source), newest(runs.folder / "tuned")
    assert not any("encoder." in name.removeprefix("autoencoder.")[:8] for name in after["ema"]["weights"])
    assert "autoencoder.decoder.conv_in.weight" in after["ema"]["weights"]
    from ldm import config

    first, second = (config.first_stage(str(runs.folder / name), "") for name in ("autoencoder", "tuned"))
    for name, value in first.encoder_state().items():
        assert torch.equal(second.encoder_state()[name], value)
    weight = "decoder.conv_in.weight"
    assert not torch.equal(first.autoencoder.state_dict()[weight], second.autoencoder.state_dict()[weight])
    assert before["ema"]["weights"].keys() > after["ema"]["weights"].keys()


def test_a_run_starts_from_another_s_weights(runs: Runs):  # noqa: F811
    source = runs.folder / "straight"
    assert here("train.py", *runs.demo("continued", 1), f"init_from={source}", "model.optimizer.lr=1e-12") == 0
    before, after = newest(source)["ema"]["weights"], newest(runs.folder / "continued")["ema"]["weights"]
    assert after.keys() == before.keys()
    torch.testing.assert_close(dict(after), dict(before), rtol=0, atol=1e-10)
