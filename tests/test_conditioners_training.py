"""Class and spatial conditioners, by their own configs: from the shard to the optimizer's steps and the grid of samples."""

import io
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cached import encode, members
from conftest import write_tar
from test_config import composed
from test_latent_diffusion import SAMPLING
from test_text_pretrained import tiny_conditioner
from tiny import SIDE, latent_diffusion, randomized

from ldm import config
from ldm.data.datamodule import ShardDataModule
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.conditioners import ClassLabel
from ldm.models.dit import DiT
from ldm.models.first_stage import FirstStage
from ldm.models.unet import UNet
from ldm.training.callbacks import DataPosition, SampleGrid

BAD = 3  # samples whose further member is spoiled
CLASSES = ["data/field=[label]", "model/conditioner=class_label", "model.conditioner.classes=5"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's


def depth(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(number).random((6, 9), np.float32))
    return file.getvalue()


def write(folder: Path, extension: str) -> str:
    """Two shards of 12 captioned pictures with this member, which the first BAD have spoiled."""
    folder.mkdir()
    for shard in range(2):
        rows = []
        for number in range(12 * shard, 12 * shard + 12):
            further = {"cls": str(number % 5).encode(), "depth.npy": depth(number)}[extension]
            sample = members(number) | {extension: further if number >= BAD else b"?"}
            rows += [(f"{number:09d}.{name}", data) for name, data in sample.items()]
        write_tar(folder / f"{shard:05d}.tar", rows)
    return f"{folder}/{{00000..00001}}.tar"


def datamodule(spec: str, *choices: str, side: int = SIDE) -> ShardDataModule:
    """As configs/data has it; the second shard validates."""
    given = ["name=x", "trainer.max_steps=3", "run_dir=unused", f"data.shards={spec}", f"data.side={side}",
             "data.batch_size=4", "data.budget=0.5", "data.val_samples=4", *choices]  # fmt: skip
    return config.build(composed("train", *given).data)


def fit(data: ShardDataModule, module: pl.LightningModule, folder: Path) -> None:
    pictures = SampleGrid(str(folder), count=4, columns=4, sampling=SAMPLING, seed=0)
    trainer = pl.Trainer(max_steps=3, val_check_interval=3, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
                         log_every_n_steps=1, callbacks=[DataPosition(str(folder)), pictures])  # fmt: skip
    before = [p.detach().clone() for p in module.denoiser.parameters()]
    trainer.fit(module, data)
    assert trainer.global_step == 3
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert not any(torch.equal(*pair) for pair in zip(before, module.denoiser.parameters(), strict=True))
    assert (folder / "samples" / "step_00000003.png").is_file()


def of_classes() -> tuple[ClassLabel, DiT]:
    return ClassLabel(5, 8), randomized(DiT(2, 2, 16, 2, 2, vector_channels=8))


def test_classes_train_and_a_number_is_a_prompt(tmp_path: Path):
    conditioner, backbone = of_classes()
    table = conditioner.table.weight.detach().clone()
    data = datamodule(write(tmp_path / "shards", "cls"), *CLASSES)
    fit(data, latent_diffusion(conditioner=conditioner, backbone=backbone), tmp_path)
    assert set(data.tally().dropped) == {"label/not a number"}
    assert (conditioner.table.weight != table).any(dim=1).all()
    part = next(iter(data.val_dataloader()))
    assert part["caption"] == [str(label) for label in part["label"].tolist()] == ["2", "3", "4", "0"]
    assert torch.equal(conditioner(part).vector, conditioner({"caption": part["caption"]}).vector)


def test_classes_train_from_a_latent_cache(tmp_path: Path):
    spec, cache = write(tmp_path / "shards", "cls"), tmp_path / "cache"
    encode(spec, cache, text=None)
    conditioner, backbone = of_classes()
    stored = ["data=latents", f"data.decode.folder={cache}"]
    data = datamodule(f"{cache}/{{00000..00001}}.tar", *stored, *CLASSES)
    fit(data, latent_diffusion(conditioner=conditioner, backbone=backbone), tmp_path)
    assert set(data.tally().dropped) == {"label/not a number"}
    with pytest.raises(UserError, match="a depth map, which goes with pictures: a latent cache has none"):
        next(iter(datamodule(f"{cache}/{{00000..00001}}.tar", *stored, "data/field=[depth]").train_dataloader()))


@pytest.mark.parametrize(
    ("name", "levels", "vector"), [("sd2_inpaint", 4, 0), ("sd2_depth", 4, 0), ("x4_upscaler", 3, 1000)]
)
def test_what_is_seen_in_place_trains(name: str, levels: int, vector: int, tmp_path: Path):
    """On latents of 4 x 4 of 4 channels, as small as the published factors let them be."""
    conditioner = tiny_conditioner(name)
    stage = FirstStage(randomized(AutoencoderKL(4, 4, [1] * levels, blocks=1, groups=2)), [0.0] * 4, [1.0] * 4)
    backbone = UNet(4 + conditioner.spatial_channels, 4, 8, [1, 2], blocks=1, depths=[0, 1], middle_depth=1,
                    context_channels=16, heads=2, groups=4, vector_levels=vector)  # fmt: skip
    choices = [f"model/conditioner={name}", *(["data/field=[depth]"] if name == "sd2_depth" else [])]
    data = datamodule(write(tmp_path / "shards", "depth.npy"), *choices, side=2 ** (levels + 1))
    module = latent_diffusion(first_stage=stage, conditioner=conditioner, backbone=randomized(backbone))
    fit(data, module, tmp_path)
    assert set(data.tally().dropped) == ({"depth/unreadable"} if name == "sd2_depth" else set())
