import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from tiny import batch, latent_diffusion, silent
from torch.utils.data import DataLoader

from ldm.batch import Batch, to_uint8
from ldm.data.accounts import Tally
from ldm.errors import UserError
from ldm.evaluation.features import PooledPixels
from ldm.evaluation.metrics import FrechetDistance
from ldm.training.callbacks import (
    DataPosition,
    GenerationScores,
    LossBySigma,
    Pictures,
    RawValidation,
    ReconstructionGrid,
    SampleGrid,
)
from ldm.training.ema import EMA


def trainer(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **(
            {
                "is_global_zero": True,
                "sanity_checking": False,
                "global_step": 30,
                "loggers": [],
                "precision_plugin": Precision(),
            }
            | changes
        )
    )


def validate(callback: Pictures, trainer: SimpleNamespace, module: object, batches: list[Batch]) -> None:
    for i, part in enumerate(batches):
        callback.on_validation_batch_end(trainer, module, None, part, i)
    callback.on_validation_epoch_end(trainer, module)


def test_the_data_module_is_told_what_was_consumed_and_reports_with_each_logged_step(tmp_path: Path):
    told, logged = [], []
    tally = Tally(0.01)
    tally.add(5, {"image/truncated": 2}, {"image/truncated": "a.tar: 7"})
    data = SimpleNamespace(consumed=told.append, tally=lambda: tally)
    module = SimpleNamespace(log_dict=lambda values, **_: logged.append(values))
    part, callback = batch(2), DataPosition(str(tmp_path))
    for i in range(6):  # three steps of two micro-batches
        stub = trainer(datamodule=data, global_step=(i + 1) // 2, log_every_n_steps=2, accumulate_grad_batches=2)
        callback.on_train_batch_end(stub, module, None, part, i)
    assert told == [part] * 6
    assert logged == [{"data/dropped/image/truncated": 2.0}]
    assert json.loads((tmp_path / "data_report.json").read_text()) == tally.report()
    (tmp_path / "data_report.json").unlink()
    callback.on_train_end(stub, module)
    assert (tmp_path / "data_report.json").is_file()


class Halves:
    """An autoencoder's module whose reconstruction is mid-gray."""

    def reconstruct(self, images: torch.Tensor, captions: list[str], index: torch.Tensor) -> torch.Tensor:
        return torch.zeros(images[index].shape)


def test_reconstruction_grid_shows_inputs_reconstructions_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = {}
    monkeypatch.setattr("ldm.training.callbacks.picture_grid", lambda *a: seen.update(a=a) or Image.new("RGB", (4, 4)))
    validate(ReconstructionGrid(str(tmp_path), count=3, columns=2), trainer(), Halves(), [batch(2), batch(2, start=2)])
    pictures, captions, columns = seen["a"]
    assert columns == 6
    assert captions == ["input", "reconstruction", "error x 4"] * 3  # three samples: one of the second batch's two
    images = torch.cat([batch(2)["image"], batch(1, start=2)["image"]])
    assert torch.equal(pictures[0::3], images)
    assert (pictures[1::3] == 128).all()
    assert torch.equal(pictures[2::3].int(), ((images.int() - 128).abs() * 4).clamp(max=255))
    assert (tmp_path / "samples" / "step_00000030.png").is_file()


def sampling(denoiser, cond, null, random, shape):
    return random.normal("sampling", shape) + cond.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def test_sample_grid_draws_the_first_captions_from_the_same_noise_each_time(tmp_path: Path):
    module = latent_diffusion()
    callback = SampleGrid(str(tmp_path), count=3, columns=3, sampling=sampling, seed=7)
    for step in (10, 20):
        validate(callback, trainer(global_step=step), module, [batch(2), batch(2, start=2), batch(2, start=4)])
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["step_00000010.png", "step_00000020.png"]
    first, second = (np.asarray(Image.open(file)) for file in files)
    assert (first == second).all()
    part = batch(3)
    images = to_uint8(module.sample(sampling, part["caption"], part["index"], side=8, seed=7))
    cell = Image.fromarray(images[2].permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.NEAREST)
    assert (first[8:136, 8 + 2 * 136 : 136 + 2 * 136] == np.asarray(cell)).all()


def test_nothing_is_drawn_in_the_sanity_check_or_on_other_ranks(tmp_path: Path):
    for state in (trainer(sanity_checking=True), trainer(is_global_zero=False)):
        callback = ReconstructionGrid(str(tmp_path), count=2, columns=2)
        validate(callback, state, Halves(), [batch(2)])
        assert callback.batches == []
    assert not (tmp_path / "samples").exists()


def test_a_wandb_logger_gets_the_picture(tmp_path: Path):
    logged = []

    class Fake(WandbLogger):
        def __init__(self) -> None:
            pass

        def log_image(self, key: str, images: list, step: int | None = None, **_: object) -> None:
            logged.append((key, [image.mode for image in images]))

    callback = ReconstructionGrid(str(tmp_path), count=2, columns=2)
    validate(callback, trainer(loggers=[Fake()]), Halves(), [batch(2)])
    assert logged == [("val/samples", ["RGB"])]


def test_a_few_samples_are_scored_at_each_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)  # of all ranks only the first has pictures
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    module = latent_diffusion()
    logged = silent(module)
    metrics = {"a": FrechetDistance(PooledPixels(1)), "b": None}
    callback = GenerationScores(str(tmp_path), 5, sampling, 7, metrics)
    parts = [batch(4), batch(4, start=4)]
    expected = FrechetDistance(PooledPixels(1))
    for part in (batch(4), batch(1, start=4)):
        images = to_uint8(module.sample(sampling, part["caption"], part["index"], side=8, seed=7))
        expected.update(images, part["caption"], part["image"])
    expected.distributed_available_fn = lambda: False
    for step in (10, 20):
        logged.clear()
        validate(callback, trainer(global_step=step), module, parts)
        assert logged == {"val/frechet/pixels1": pytest.approx(expected.compute()["frechet/pixels1"], rel=1e-6)}
    assert list(tmp_path.iterdir()) == []


def test_the_loss_by_noise_level_is_the_mean_of_each_level_s_samples():
    logged: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.update(values, step=step))
    outputs = {"losses": torch.tensor([1.0, 2.0, 4.0, 8.0]), "sigma": torch.tensor([0.05, 2.0, 3.0, 50.0])}
    stub = trainer(
        log_every_n_steps=10, accumulate_grad_batches=2, strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums),
        loggers=[logger],
    )  # fmt: skip
    callback = LossBySigma([0.1, 1.0, 10.0])
    callback.on_train_batch_end(stub, None, outputs, batch(4), 0)  # the first half of a step
    assert logged == {}
    callback.on_train_batch_end(stub, None, outputs, batch(4), 1)
    assert logged == {"train/loss_sigma/below": 1.0, "train/loss_sigma/1": 3.0, "train/loss_sigma/10": 8.0, "step": 29}
    with pytest.raises(UserError, match=r"edges=\[1, 0.5\]; give ascending noise levels"):
        LossBySigma([1, 0.5])


def test_pictures_are_drawn_in_the_precision_of_training(tmp_path: Path):
    drawn = []

    class Seen(SampleGrid):
        def draw(self, *_: object) -> Image.Image:
            drawn.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            return Image.new("RGB", (1, 1))

    for plugin in (Precision(), MixedPrecision("bf16-mixed", "cpu")):
        validate(Seen(str(tmp_path), 1, 1, None, 0), trainer(precision_plugin=plugin), None, [batch(1)])
    assert drawn == [torch.float32, torch.bfloat16]


def test_raw_and_averaged_weights_are_validated_alike():
    """Under the same weights the two passes give the same losses, and with others each sees its own."""
    data = DataLoader([batch(3), batch(2, start=3)], batch_size=None)
    for decay, same in ((0.0, True), (0.9, False)):
        module, found = latent_diffusion(), {}
        read = pl.Callback()
        read.on_validation_end = lambda trainer, module, found=found: found.update(trainer.callback_metrics)
        pl.Trainer(
            accelerator="cpu", max_steps=2, val_check_interval=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[RawValidation(), EMA(decay), read],
        ).fit(module, data, data)  # fmt: skip
        raw, averaged = (
            {k.split("/")[-1]: float(v) for k, v in found.items() if k.startswith(p)} for p in ("val/raw", "val/loss")
        )
        assert raw.keys() == averaged.keys()
        assert all((raw[name] == pytest.approx(averaged[name], rel=1e-5)) is same for name in raw)
