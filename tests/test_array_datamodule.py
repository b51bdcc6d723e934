"""Arrays through Lightning's checkpoints; the sequence itself is in test_arrays.py."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from cached import CACHE, encode, text_encoder, write_source
from tiny import SIDE, autoencoder, latent_diffusion, randomized

from ldm.data.array_datamodule import ArrayDataModule
from ldm.data.arrays import pack
from ldm.errors import UserError
from ldm.models.conditioners import TextConditioner
from ldm.models.first_stage import FirstStage
from ldm.training.callbacks import DataPosition
from ldm.training.latent_diffusion import LatentDiffusionModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache, out = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("arrays")
    encode(write_source(tmp_path_factory.mktemp("source")), cache)
    pack(cache, out, CACHE)
    return out


def fit(folder: Path, run: Path, steps: int, resume: bool = False, **changes: object) -> LatentDiffusionModule:
    torch.manual_seed(0)
    module = latent_diffusion(conditioner=TextConditioner(text_encoder(), pooled=True), **changes)
    data = ArrayDataModule(
        str(folder), None, side=SIDE, batch_size=8, steps=7, seed=3, val_batch_size=4, run_dir=str(run), val_samples=6,
        random_flip=True,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[
            DataPosition(str(run)),
            pl.callbacks.ModelCheckpoint(run, save_last=True, every_n_train_steps=1, save_top_k=0),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, ckpt_path=run / "last.ckpt" if resume else None)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_in_two_parts_ends_in_the_same_weights(folder: Path, tmp_path: Path):
    whole = fit(folder, tmp_path / "whole", 7)
    fit(folder, tmp_path / "cut", 3)
    parts = fit(folder, tmp_path / "cut", 7, resume=True)
    for name, weight in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], weight), name


def test_fit_refuses_arrays_of_another_first_stage(folder: Path, tmp_path: Path):
    other = FirstStage(randomized(autoencoder(), 9), [0, 0], [1, 1])
    with pytest.raises(UserError, match=r"encoded by first stage \w{12}, this run has \w{12}: .* ldm shards encode"):
        fit(folder, tmp_path, 1, first_stage=other)
