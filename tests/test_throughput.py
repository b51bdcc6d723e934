import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from torch import nn
from torch.utils.data import DataLoader

from ldm.errors import UserError
from ldm.training import throughput
from ldm.training.costs import PEAKS
from ldm.training.throughput import Throughput


class Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", clock)
    return clock


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "throughput.jsonl").read_text().splitlines()]


def train(callback: Throughput, clock: Clock, steps: int, accumulate: int = 1, **changes: Any) -> None:
    """Each micro-batch is waited for 1 s and worked on for 3 s, the first for 60; a validation of 1000 s after step 2."""
    data = SimpleNamespace(batch_size=12, side=8)
    options = {"max_steps": 100, "loggers": [], "global_step": 0, "is_global_zero": True} | changes
    trainer = SimpleNamespace(accumulate_grad_batches=accumulate, log_every_n_steps=2, datamodule=data, **options)
    module = SimpleNamespace(device=torch.device("cpu"))
    callback.on_train_start(trainer, module)
    for i in range(steps * accumulate):
        clock.now += 1
        callback.on_train_batch_start(trainer, module, None, i)
        clock.now += 3 if i else 60
        trainer.global_step = (i + 1) // accumulate
        callback.on_train_batch_end(trainer, module, None, None, i)
        if i + 1 == 2 * accumulate:
            callback.on_validation_start(trainer, module)
            clock.now += 1000
            callback.on_validation_end(trainer, module)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_rates_without_the_first_batch_and_without_validation(tmp_path: Path, clock: Clock, accumulate: int):
    train(Throughput(str(tmp_path), price_per_hour=36.0), clock, 7, accumulate)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]
    for row in rows(tmp_path):
        assert row["samples_per_second"] == pytest.approx(3 / accumulate)
        assert row["pixels_per_second"] == pytest.approx(192 / accumulate)
        assert (row["data_wait_percent"], row["step_percent"]) == (pytest.approx(25), pytest.approx(75))
        hours = (100 - row["step"]) * 4 * accumulate / 3600
        assert row["eta_hours"] == pytest.approx(hours)
        assert row["cost_left"] == pytest.approx(36 * hours)
        assert 0.01 < row["peak_memory_gb"] < 1000
        assert "mfu" not in row
    batches = 6 * accumulate - 1
    assert rows(tmp_path)[-1]["cost"] == pytest.approx(36 * 4 * batches / 3600)


def test_without_a_price_there_is_no_cost(tmp_path: Path, clock: Clock):
    train(Throughput(str(tmp_path)), clock, 2)
    assert not [name for name in rows(tmp_path)[0] if "cost" in name]


class Layer(pl.LightningModule):
    """16 features to 32, without an input that requires grad: 2 B 16 32 operations forward, as many backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 32)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    batch_size, side = 8, 4

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(64, 16), batch_size=4)


def test_operations_are_counted_once(tmp_path: Path):
    callback = Throughput(str(tmp_path), peak_tflops=1e-3)
    trainer = pl.Trainer(max_steps=4, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
                         log_every_n_steps=1, callbacks=[callback])  # fmt: skip
    trainer.fit(Layer(), datamodule=Data())
    assert callback.operations == 2 * (2 * 4 * 16 * 32)
    for row in rows(tmp_path):
        micro_batches = row["samples_per_second"] / 4
        assert row["mfu"] == pytest.approx(callback.operations * micro_batches / 1e9)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_the_rest_of_the_ranks_write_nothing_and_wandb_gets_the_same(tmp_path: Path, clock: Clock):
    class Logged(WandbLogger):
        def __init__(self) -> None:
            self.seen: list[tuple[dict, int]] = []

        def log_metrics(self, metrics: dict, step: int) -> None:
            self.seen.append((metrics, step))

    logger = Logged()
    train(Throughput(str(tmp_path / "none")), clock, 4, is_global_zero=False)
    assert not (tmp_path / "none").exists()
    train(Throughput(str(tmp_path)), clock, 4, loggers=[logger])
    assert [step for _, step in logger.seen] == [1, 3]  # the index of the step just finished, as Lightning's own
    first = {name: value for name, value in rows(tmp_path)[0].items() if name != "step"}
    assert logger.seen[0][0] == {f"throughput/{name}": value for name, value in first.items()}


def test_the_share_of_the_encoders_is_that_of_training_and_counted_once(tmp_path: Path, clock: Clock):
    class Slow(nn.Module):
        """A conditioner that takes half a second itself, and calls the first stage for one."""

        def __init__(self, seconds: float, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.seconds, self.inner = seconds, inner

        def forward(self, x: int) -> int:
            clock.now += self.seconds
            return x if self.inner is None else self.inner(x)

    encoder = Slow(1.0)
    module = SimpleNamespace(
        device=torch.device("cpu"), conditioner=Slow(0.5, encoder),
        first_stage=SimpleNamespace(autoencoder=SimpleNamespace(encoder=encoder, quant_conv=None)),
    )  # fmt: skip
    callback = Throughput(str(tmp_path))
    trainer = SimpleNamespace(accumulate_grad_batches=1, log_every_n_steps=2, global_step=0, max_steps=9, loggers=[],
                              datamodule=SimpleNamespace(batch_size=1, side=8), is_global_zero=True)  # fmt: skip
    callback.on_train_start(trainer, module)
    for i in range(4):
        callback.on_train_batch_start(trainer, module, None, i)
        module.first_stage.autoencoder.encoder(1)
        module.conditioner(1)
        clock.now += 2.5
        trainer.global_step = i + 1
        if i == 2:
            callback.on_validation_start(trainer, module)
            module.conditioner(1)
            callback.on_validation_end(trainer, module)
        callback.on_train_batch_end(trainer, module, None, None, i)
    callback.on_train_end(trainer, module)
    assert [row["encode_percent"] for row in rows(tmp_path)] == [pytest.approx(50)] * 2
    module.conditioner(1)
    assert callback.encoding == 0
    on_gpu = Throughput(str(tmp_path), peak_tflops=1.0)
    on_gpu.on_train_start(trainer, SimpleNamespace(**vars(module) | {"device": torch.device("cuda")}))
    assert on_gpu.hooks == []


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA L40S", 362),
     ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("Some Other", None)],
)  # fmt: skip
def test_the_peak_by_the_device_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, peak: float | None
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    callback = Throughput(str(tmp_path))
    callback.on_train_start(SimpleNamespace(), SimpleNamespace(device=torch.device("cuda")))
    assert callback.peak_tflops == peak
    assert all(
        next(name for name in PEAKS if name in key) == key for key in PEAKS
    )  # none stands behind a part of its name


@pytest.mark.parametrize("wrong", [{"price_per_hour": 0.0}, {"peak_tflops": -1.0}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, float]):
    with pytest.raises(UserError, match="give a number above 0, or null"):
        Throughput(str(tmp_path), **wrong)
