"""The two commands on tiny shards and networks: train, resume, train longer, evaluate; always the same numbers."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from tiny import here, process

from ldm.data import shapes
from ldm.data.writer import ShardWriter
from ldm.training import checkpointing

COMMON = ["trainer=cpu", "logger=none",
          "callbacks.progress=null", "trainer.enable_progress_bar=false", "model/lr_schedule=warmup",
          "model.lr_schedule.warmup=2", "callbacks.pictures.count=2", "trainer.log_every_n_steps=1",
          "data.batch_size=8", "data.val_samples=12", "data.val_batch_size=8"]  # fmt: skip
AUTOENCODER = ["experiment=demo_autoencoder", *COMMON, "model.autoencoder.channels=8", "trainer.max_steps=2",
               "trainer.val_check_interval=2"]  # fmt: skip
DEMO = ["experiment=demo", *COMMON, "model.backbone.channels=16", "model.backbone.head_dim=8",
        "model.backbone.context_channels=16", "model.backbone.vector_channels=16", "model.conditioner.encoder.width=16",
        "model.conditioner.encoder.layers=1", "model.conditioner.encoder.heads=2",
        "model.conditioner.encoder.embed_width=8", "sampling.steps=2", "trainer.val_check_interval=3",
        "callbacks.checkpoint.every=2"]  # fmt: skip


class Runs(NamedTuple):
    """Shards, a trained first stage, and a demo of six steps that was never interrupted."""

    folder: Path
    data: list[str]

    def autoencoder(self, name: str) -> list[str]:
        return [*AUTOENCODER, *self.data, f"run_dir={self.folder}/{name}"]

    def demo(self, name: str, steps: int = 6) -> list[str]:
        first_stage = f"model.first_stage.run={self.folder}/autoencoder"
        return [*DEMO, *self.data, first_stage, f"run_dir={self.folder}/{name}", f"trainer.max_steps={steps}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("with a space")
    for number, (split, count) in enumerate((("train", 200), ("val", 48))):
        with ShardWriter(folder / split, shard_size=50) as writer:
            for i in range(count):
                rng = np.random.default_rng([number, i])
                scene = shapes.training_scene(rng) if split == "train" else shapes.validation_scene(i, rng)
                file = io.BytesIO()
                Image.fromarray(shapes.render(scene, 32)).save(file, "PNG")
                writer.write(file.getvalue(), "png", shapes.caption(scene, rng))
    runs = Runs(folder, [f"data.shards={folder}/train/{{00000..00003}}.tar", f"data.val_shards={folder}/val/00000.tar"])
    assert here("train.py", *runs.autoencoder("autoencoder")) == 0
    assert here("train.py", *runs.demo("straight")) == 0
    return runs


def newest(run_dir: Path) -> dict[str, Any]:
    return checkpointing.read(checkpointing.newest(run_dir))


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, down to the last tensor."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_checkpoint(a: Path, b: Path) -> None:
    first, second = newest(a), newest(b)
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step", "frozen_digest",
                "ShardDataModule"):  # fmt: skip
        assert_same(first[key], second[key], key)


def test_a_run_directory_holds_what_it_should(runs: Runs):
    run_dir = runs.folder / "straight"
    assert {p.name for p in run_dir.iterdir()} == {
        "config.yaml", "metrics.jsonl", "throughput.jsonl", "data_report.json", "checkpoints", "samples",
    }  # fmt: skip
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("*.ckpt")) == [
        "step_00000004.ckpt",
        "step_00000006.ckpt",
    ]
    assert sorted(p.name for p in (run_dir / "samples").iterdir()) == ["step_00000003.png", "step_00000006.png"]
    assert json.loads((run_dir / "data_report.json").read_text()) == {
        "delivered": 48,
        "dropped": {},
        "last_dropped": {},
    }
    rows = [json.loads(line) for line in lines(run_dir)]
    assert [(row["step"], row["samples_seen"]) for row in rows if "train/loss" in row] == [
        (n, 8 * n) for n in range(1, 7)
    ]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]


def test_a_checkpoint_holds_plain_data_and_no_first_stage(runs: Runs):
    path = checkpointing.newest(runs.folder / "straight")
    checkpoint = torch.load(path, weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"conditioner", "denoiser"}
    assert {key.split(".")[0] for key in checkpoint["ema"]["weights"]} == {"conditioner", "denoiser"}
    assert checkpoint["ema"]["updates"] == checkpoint["global_step"] == 6
    stage_one = newest(runs.folder / "autoencoder")["state_dict"]
    assert stage_one["latent_std"].isfinite().all()


def test_the_same_command_gives_the_same_bits_in_another_directory_and_process(runs: Runs):
    """With the machine's own number of threads: it decides in which order a sum is taken, so it is the same for both."""
    result, other = (process("train.py", *runs.demo(name)) for name in ("once", "again"))
    assert (result.returncode, other.returncode) == (0, 0), result.stderr + other.stderr
    assert lines(runs.folder / "again") == lines(runs.folder / "once")
    assert_same_checkpoint(runs.folder / "again", runs.folder / "once")
    for picture in (runs.folder / "once" / "samples").iterdir():
        assert (runs.folder / "again" / "samples" / picture.name).read_bytes() == picture.read_bytes()
    assert "starts at step 0" in result.stdout
    assert "validation at step 6: loss " in result.stdout
    assert result.stderr == ""


def test_a_run_in_four_parts_is_the_run_in_one(runs: Runs, capsys: pytest.CaptureFixture[str]):
    """Continued at the end of its data, before and after a validation."""
    for before, steps in ((0, 1), (1, 3), (3, 4), (4, 6)):
        assert here("train.py", *runs.demo("longer", steps)) == 0
        assert ("starts at step 0" if before == 0 else f"continues from step {before}") in capsys.readouterr().out
        assert newest(runs.folder / "longer")["global_step"] == steps
    assert lines(runs.folder / "longer") == lines(runs.folder / "straight")
    assert_same_checkpoint(runs.folder / "longer", runs.folder / "straight")


def test_a_run_killed_between_checkpoints_ends_the_same(runs: Runs):
    """Killed after step 5, in the middle of a line: step 4 is the newest checkpoint, the log is ahead of it."""
    killed = runs.folder / "killed"
    assert here("train.py", *runs.demo("killed")) == 0
    checkpointing.newest(killed).unlink()
    rows = [line for line in lines(killed) if json.loads(line)["step"] <= 5]
    (killed / "metrics.jsonl").write_text("\n".join(rows) + "\n" + rows[-1][:20])
    (killed / "checkpoints" / "step_00000006.partial").write_bytes(b"half a checkpoint")
    assert here("train.py", *runs.demo("killed")) == 0
    assert lines(killed) == lines(runs.folder / "straight")
    assert_same_checkpoint(killed, runs.folder / "straight")


def test_a_run_killed_in_its_first_validation_trains_the_same(runs: Runs):
    """Lightning leaves that validation out; what is trained, and every other line, is the same."""
    killed = runs.folder / "killed_validating"
    every = "callbacks.checkpoint.every=3"
    assert here("train.py", *runs.demo("killed_validating"), every) == 0
    checkpointing.newest(killed).unlink()
    rows = [line for line in lines(killed) if json.loads(line)["step"] <= 3 and "val/" not in line]
    (killed / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert here("train.py", *runs.demo("killed_validating"), every) == 0
    straight = lines(runs.folder / "straight")
    assert lines(killed) == [line for line in straight if "val/" not in line or '"step": 6' in line]
    assert_same_checkpoint(killed, runs.folder / "straight")


def test_accumulation_and_a_resume_at_a_checkpoint_s_step(runs: Runs):
    """Two micro-batches a step; validation counts micro-batches."""
    accumulate = ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6"]
    for name in ("accumulated", "accumulated_killed"):
        assert here("train.py", *runs.demo(name), *accumulate) == 0
    checkpointing.newest(runs.folder / "accumulated_killed").unlink()
    assert here("train.py", *runs.demo("accumulated_killed"), *accumulate) == 0
    assert lines(runs.folder / "accumulated_killed") == lines(runs.folder / "accumulated")
    assert_same_checkpoint(runs.folder / "accumulated_killed", runs.folder / "accumulated")
    assert newest(runs.folder / "accumulated")["ShardDataModule"]["samples_seen"] == 48


def test_the_same_command_of_a_complete_run_does_nothing(runs: Runs, capsys: pytest.CaptureFixture[str]):
    before = lines(runs.folder / "straight")
    assert here("train.py", *runs.demo("straight")) == 0
    assert "is complete at step 6: nothing to do; raise trainer.max_steps to go on" in capsys.readouterr().out
    assert lines(runs.folder / "straight") == before


def test_another_model_in_the_same_directory_is_refused(runs: Runs, capsys: pytest.CaptureFixture[str]):
    assert here("train.py", *runs.demo("straight"), "model.caption_dropout=0.2") == 2
    assert "was made with model.caption_dropout=0.1, now it is 0.2" in capsys.readouterr().err


def test_another_first_stage_under_a_run_is_refused(runs: Runs, capsys: pytest.CaptureFixture[str]):
    """The first stage was trained anew in its directory: the latents are others now."""
    stage = runs.folder / "autoencoder"
    own = runs.folder / "changed"
    assert here("train.py", *runs.demo("changed", steps=1)) == 0
    stage.rename(runs.folder / "kept")
    try:
        assert here("train.py", *runs.autoencoder("autoencoder"), "seed=1") == 0
        assert here("train.py", *runs.demo("changed", steps=2)) == 2
    finally:
        stage.rename(runs.folder / "other")
        (runs.folder / "kept").rename(stage)
    assert "the checkpoint was trained on a frozen network with digest" in capsys.readouterr().err
    assert newest(own)["global_step"] == 1


def test_evaluation_scores_the_run(runs: Runs, capsys: pytest.CaptureFixture[str]):
    run_dir = runs.folder / "straight"
    arguments = [f"checkpoint={run_dir}", "n=12", "sampling.steps=3", "sweep.guidance=[1,3]", "pictures=4"]
    assert here("evaluate.py", *arguments) == 0
    folders = sorted(path for path in (run_dir / "evaluation").iterdir() if path.is_dir())
    assert [f.name.rpartition("-")[0] for f in folders] == [
        "step6-guidance1",
        "step6-guidance3",
        "step6-reconstruction",
    ]
    content = json.loads((folders[1] / "results.json").read_text())
    assert content["protocol"]["n"] == 12
    assert content["protocol"]["sampling"]["steps"] == 3
    assert content["protocol"]["sampling"]["guidance"]["scale"] == 3
    assert content["checkpoint"] == {"step": 6}
    assert 0 <= content["metrics"]["caption_accuracy/all"] <= 1
    assert content["metrics"]["frechet/pixels4"] > 0
    assert Image.open(folders[1] / "grid.png").width == 4 * 136 + 8
    shown = capsys.readouterr().out
    assert "12 captions, step 6" in shown

    before = {f.name: (f / "results.json").read_bytes() for f in folders}
    assert here("evaluate.py", *arguments, "batch_size=5") == 0
    again = {
        f.name: json.loads((f / "results.json").read_text()) for f in (run_dir / "evaluation").iterdir() if f.is_dir()
    }
    assert again.keys() == before.keys()  # the batch size is no part of the protocol, and changes no score
    for name, result in again.items():
        assert result["metrics"] == pytest.approx(json.loads(before[name])["metrics"], rel=1e-2, abs=1e-4)


def test_wandb_offline_continues_its_run(runs: Runs):
    run_dir = runs.folder / "logged"
    for steps in (1, 2):
        arguments = [each for each in runs.autoencoder("logged") if each != "logger=none"]
        assert here("train.py", *arguments, f"trainer.max_steps={steps}", "trainer.val_check_interval=1") == 0
        wandb.finish()  # in a process of its own, its end does this
    identity = (run_dir / "wandb_id").read_text()
    assert list(run_dir.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    assert len(lines(run_dir)) == 4
