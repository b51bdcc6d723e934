from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from tiny import latent_diffusion
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.errors import UserError
from ldm.training.ema import EMA, load, swapped, trainable
from ldm.training.optim import Warmup


class Line(LightningModule):
    """One trained weight that a step moves by its own gradient, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return (self.weight * batch.mean()).square().sum()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.validated_with = self.weight.detach().clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


class Record(Callback):
    """The weight after every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, _: Any) -> None:
        self.seen.append(module.weight.detach().clone())


def fit(ema: EMA, steps: int, **options: Any) -> tuple[Line, list[Tensor], Trainer]:
    module, record = Line(), Record()
    trainer = Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                      callbacks=[ema, record], **options)  # fmt: skip
    trainer.fit(module, DataLoader(torch.linspace(0.5, 1.5, 40), batch_size=2), DataLoader(torch.ones(1)))
    return module, [*record.seen[1:], module.weight.detach().clone()], trainer


def closed_form(weights: list[Tensor], decay: float) -> Tensor:
    """weights: the start, then the one after each step."""
    average = weights[0].double()
    for n, weight in enumerate(weights[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight.double()
    return average.float()


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9999])  # none, passes its warm-up, stays in it
def test_closed_form_after_n_steps(decay: float):
    ema = EMA(decay)
    _, weights, _ = fit(ema, steps=6)
    assert ema.updates == 6
    assert ema.weights.keys() == {"weight"}
    torch.testing.assert_close(ema.weights["weight"], closed_form([torch.ones(3), *weights], decay))


def test_with_accumulation_one_update_for_each_optimizer_step():
    ema = EMA(0.9)
    _, weights, trainer = fit(ema, steps=4, accumulate_grad_batches=3)
    assert trainer.global_step == 4
    assert ema.updates == 4
    distinct = [w for i, w in enumerate(weights) if i == 0 or not torch.equal(w, weights[i - 1])]
    steps = [w for w in distinct if not torch.equal(w, torch.ones(3))]
    torch.testing.assert_close(ema.weights["weight"], closed_form([torch.ones(3), *steps], 0.9))


def test_validation_sees_the_average_and_training_goes_on_from_its_own_weights():
    ema = EMA(0.9)
    module, weights, _ = fit(ema, steps=4, val_check_interval=4, check_val_every_n_epoch=None)
    assert torch.equal(module.validated_with, ema.weights["weight"])
    assert torch.equal(module.weight.detach(), weights[-1])
    assert not torch.equal(module.weight.detach(), ema.weights["weight"])


def test_the_average_is_float32_under_low_precision_weights():
    module, trainer = Line().bfloat16(), SimpleNamespace(global_step=0)
    ema = EMA(0.9999)
    ema.updates = 10**6  # past the warm-up
    ema.on_train_start(trainer, module)
    module.weight.data.add_(1.0)
    for _ in range(100):
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module)
    assert ema.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["weight"], torch.full((3,), 2 - 0.9999**100), rtol=0, atol=1e-5)


def test_swapped_restores_bit_by_bit_also_after_an_error():
    module = Line().bfloat16()
    module.weight.data = torch.randn(3).bfloat16()
    own, average = module.weight.detach().clone(), {"weight": torch.tensor([1.0, 2.0, 3.0])}
    with swapped(module, average):
        assert module.weight.tolist() == [1, 2, 3]
    assert torch.equal(module.weight, own)
    with pytest.raises(ZeroDivisionError), swapped(module, average):
        1 / 0  # noqa: B018
    assert torch.equal(module.weight, own)


def test_a_checkpoint_brings_the_average_back():
    ema, checkpoint = EMA(0.9), {}
    module, _, trainer = fit(ema, steps=3)
    ema.on_save_checkpoint(trainer, module, checkpoint)
    after = EMA(0.9)
    after.on_load_checkpoint(trainer, module, checkpoint)
    after.on_train_start(trainer, module)
    assert after.updates == 3
    assert torch.equal(after.weights["weight"], ema.weights["weight"])
    assert not torch.equal(after.weights["weight"], module.weight)


def test_a_run_without_an_average_does_not_get_one_in_the_middle():
    with pytest.raises(UserError, match=r"no averaged weights, and callbacks.ema is set: .* callbacks.ema=null"):
        EMA(0.9).on_load_checkpoint(None, Line(), {"state_dict": {}})


def test_other_names_are_refused():
    with pytest.raises(UserError, match="do not fit the model: 2 names differ, the first is bias"):
        load(Line(), {"bias": torch.zeros(3)})


def test_it_covers_the_trained_text_encoder_and_leaves_the_first_stage_out():
    names = trainable(latent_diffusion(lr_schedule=Warmup(1))).keys()
    assert {name.split(".")[0] for name in names} == {"conditioner", "denoiser"}


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_a_decay_out_of_range_is_refused(decay: float):
    with pytest.raises(UserError, match=r"callbacks.ema.decay is .*; give a number in \[0, 1\)"):
        EMA(decay)
