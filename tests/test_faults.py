"""One process: what a step that is left out leaves as it was. Two ranks: test_survival (R14)."""

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pytorch_lightning import Trainer
from test_end_to_end import assert_same
from tiny import batch, latent_diffusion
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.batch import Batch
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.training.base import TrainingModule
from ldm.training.ema import EMA
from ldm.training.faults import Faults


class Line(TrainingModule):
    """Two weights; micro-batch i of `losses` multiplies the loss, of `slopes` the gradient alone. A faulty loss without a
    faulty gradient: `added`.
    """

    added: ClassVar[dict[int, float]] = {}

    def __init__(self, optimizer: Any, losses: dict[int, float], slopes: dict[int, float]) -> None:
        super().__init__(optimizer, lambda step: 1 / (1 + step), seed=0)
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(1))
        self.losses, self.slopes = losses, slopes
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, i: int) -> Tensor:
        weight = self.weight * 1
        weight.register_hook(lambda slope: slope * self.slopes.get(i, 1))
        loss = ((weight * batch["index"].float().sum() / 10 + self.bias) - 1).square().sum()
        return loss * self.losses.get(i, 1) + self.added.get(i, 0)

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(torch.cat([self.weight, self.bias]).detach().clone())


def samples(i: int) -> Batch:
    return Batch(index=torch.tensor([2 * i, 2 * i + 1]), key=[f"a{i}", f"b{i}"])


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


def fit(faults: Faults, steps: int, accumulate: int = 1, losses: dict[int, float] | None = None,
        slopes: dict[int, float] | None = None, optimizer: Any = OPTIMIZERS["adamw"],
        clip: float | None = 1.0) -> tuple[Line, EMA, Trainer]:  # fmt: skip
    module, ema = Line(optimizer, losses or {}, slopes or {}), EMA(0.9)
    trainer = Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
                      gradient_clip_val=clip, callbacks=[faults, ema])  # fmt: skip
    trainer.fit(module, DataLoader([samples(i) for i in range(steps * accumulate)], batch_size=None))
    return module, ema, trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fault", [{"losses": {2: torch.nan}}, {"losses": {2: torch.inf}}, {"slopes": {2: torch.nan}},
                                   {"slopes": {2: 1e30}}])  # fmt: skip
def test_a_faulty_step_moves_nothing_and_counts(tmp_path: Path, optimizer: str, fault: dict[str, Any]):
    """1e30 is finite, but the norm of such gradients is not."""
    module, ema, trainer = fit(Faults(str(tmp_path)), 2, optimizer=OPTIMIZERS[optimizer])
    faulty, faulty_ema, faulty_trainer = fit(Faults(str(tmp_path)), 3, optimizer=OPTIMIZERS[optimizer], **fault)
    assert torch.equal(faulty.seen[2], module.seen[1])
    assert torch.equal(faulty.seen[1], module.seen[1])
    assert_same(faulty_trainer.optimizers[0].state_dict()["state"], trainer.optimizers[0].state_dict()["state"])
    assert (faulty_ema.updates, ema.updates) == (2, 2)
    assert_same(faulty_ema.weights, ema.weights)
    assert faulty_trainer.global_step == 3  # the data were used, the schedule goes on
    assert faulty_trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_a_faulty_loss_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Line, "added", {2: torch.inf})
    module, ema, _ = fit(Faults(str(tmp_path)), 3)
    assert torch.equal(module.seen[2], module.seen[1])
    assert ema.updates == 2


def test_training_goes_on_after_it(tmp_path: Path):
    faults = Faults(str(tmp_path))
    module, ema, _ = fit(faults, 6, losses={2: torch.nan, 3: torch.nan})
    assert module.seen[-1].isfinite().all()
    assert not torch.equal(module.seen[4], module.seen[3])
    assert (faults.total, faults.in_a_row, ema.updates) == (2, 0, 4)


def test_without_faults_every_bit_is_as_without_the_callback(tmp_path: Path):
    with_it = fit(Faults(str(tmp_path)), 5, accumulate=2)[0]
    without = fit(
        type("None", (Faults,), {"on_before_optimizer_step": lambda *_: None})(str(tmp_path)), 5, accumulate=2
    )[0]
    assert torch.equal(with_it.seen[-1], without.seen[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [4, 5])
def test_with_accumulation_one_bad_micro_batch_is_a_bad_step(tmp_path: Path, bad: int):
    """The file has the whole step's samples, and the loss of each micro-batch."""
    module, ema, trainer = fit(Faults(str(tmp_path)), 4, accumulate=2, losses={bad: torch.nan})
    assert torch.equal(module.seen[5], module.seen[3])
    assert not torch.equal(module.seen[7], module.seen[5])
    assert (trainer.global_step, ema.updates) == (4, 3)
    (row,) = map(json.loads, (tmp_path / "nonfinite" / "rank0.jsonl").read_text().splitlines())
    assert row["step"] == 3
    assert row["keys"] == ["a4", "b4", "a5", "b5"]
    assert row["index"] == [8, 9, 10, 11]
    assert [loss == "nan" for loss in row["loss"]] == [bad == 4, bad == 5]
    assert row["gradient_norm"] == "nan"
    assert row["parameters"] == ["weight", "bias"]


def test_k_in_a_row_end_the_run(tmp_path: Path):
    faults = Faults(str(tmp_path), limit=3)
    with pytest.raises(
        UserError, match=r"step 7: a loss or gradient is not finite, 3 times in a row; their samples are in "
    ):
        fit(faults, 10, losses=dict.fromkeys((1, 2, 4, 5, 6), torch.nan))
    assert faults.total == 5


def test_the_counts_are_in_the_checkpoint(tmp_path: Path):
    faults, after, checkpoint = Faults(str(tmp_path)), Faults(str(tmp_path)), {}
    fit(faults, 3, losses={0: torch.nan, 2: torch.nan})
    faults.on_save_checkpoint(None, None, checkpoint)
    after.on_load_checkpoint(None, None, checkpoint)
    assert (after.total, after.in_a_row) == (2, 1)
    after.on_load_checkpoint(None, None, {})
    assert (after.total, after.in_a_row) == (0, 0)


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path):
    for _ in range(2):
        fit(Faults(str(tmp_path)), 3, losses={1: torch.nan})
    assert len((tmp_path / "nonfinite" / "rank0.jsonl").read_text().splitlines()) == 1


def test_a_diffusion_model_s_sigma_is_the_one_it_trained_with(tmp_path: Path):
    module, faults = latent_diffusion(), Faults(str(tmp_path))
    faults.file = tmp_path / "nonfinite" / "rank0.jsonl"
    part = batch(4, start=3)
    drawn = module.loss(
        lambda x, sigma, cond: x, torch.zeros(4, 2, 4, 4), None, KeyedRandom(module.seed, part["index"])
    )[1]
    faults.batches = [Batch(key=["k"] * 4, index=part["index"])]
    faults._write(1, module, torch.tensor(1.0))
    assert json.loads(faults.file.read_text())["sigma"] == pytest.approx(drawn.tolist())


def test_trained_parameters_without_a_gradient_are_named_with_the_first_step(tmp_path: Path):
    class Idle(Line):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.idle, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)

    module = Idle(OPTIMIZERS["adamw"], {}, {})
    trainer = Trainer(max_steps=3, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=[Faults(str(tmp_path))])  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"2 trained parameters get no gradient: idle.weight, idle.bias; freeze"
    ) as told:
        trainer.fit(module, DataLoader([samples(i) for i in range(3)], batch_size=None))
    assert len([each for each in told if "no gradient" in str(each.message)]) == 1


def test_a_limit_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"callbacks.faults.limit=0"):
        Faults(str(tmp_path), limit=0)
