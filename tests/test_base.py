import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from tiny import adam
from torch import nn

from ldm.errors import UserError
from ldm.training.base import TrainingModule, digest, frozen_state
from ldm.training.loggers import JsonlLogger
from ldm.training.optim import Warmup


class Module(TrainingModule):
    """A frozen network, one that is frozen in part, and a trained one with a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(adam, Warmup(2), seed=0)
        torch.manual_seed(seed)
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
        self.mixed = nn.ModuleDict({"encoder": nn.Linear(2, 2).requires_grad_(False), "head": nn.Linear(2, 2)})
        self.trained = nn.BatchNorm1d(2)


def saved(module: TrainingModule) -> dict:
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_frozen_state_is_every_untrained_submodule_with_its_buffers():
    names = {key.rpartition(".")[0] for key in frozen_state(Module())}
    assert names == {"frozen.0", "frozen.1", "mixed.encoder"}
    assert "frozen.1.running_mean" in frozen_state(Module())


def test_a_checkpoint_holds_what_is_trained_and_names_what_is_not():
    module = Module()
    checkpoint = saved(module)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"mixed", "trained"}
    assert not any(key.startswith(("frozen", "mixed.encoder")) for key in checkpoint["state_dict"])
    assert "trained.running_mean" in checkpoint["state_dict"]
    assert checkpoint["frozen_digest"] == digest(frozen_state(module))


def test_loading_is_strict_with_the_frozen_entries_put_back():
    module, checkpoint = Module(), saved(Module())
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    incomplete = saved(Module())
    del incomplete["state_dict"]["trained.weight"]
    module.on_load_checkpoint(incomplete)
    with pytest.raises(RuntimeError, match=r"Missing key.*trained.weight"):
        module.load_state_dict(incomplete["state_dict"])


def test_another_frozen_network_is_refused():
    with pytest.raises(UserError, match="trained on a frozen network with digest"):
        Module(seed=1).on_load_checkpoint(saved(Module()))


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.5])},  # a value
        {"b": torch.tensor([1.0, 2.0])},  # a name
        {"a": torch.tensor([[1.0, 2.0]])},  # a shape
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},  # a type
        {},
    ],
)
def test_digest_sees_values_names_shapes_and_types(other: dict[str, torch.Tensor]):
    base = {"a": torch.tensor([1.0, 2.0])}
    assert digest(base) == digest({"a": torch.tensor([[1.0], [2.0]]).T[0]})  # not the memory layout
    assert digest(base) != digest(other)


def test_digest_does_not_depend_on_order_and_takes_every_type():
    tensors = {"a": torch.tensor(1.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor([True])}
    assert digest(tensors) == digest(dict(reversed(tensors.items())))


def test_the_optimizer_gets_what_requires_grad_and_follows_the_schedule():
    module = Module()
    configured = module.configure_optimizers()
    parameters = configured["optimizer"].param_groups[0]["params"]
    assert {id(p) for p in parameters} == {id(p) for p in module.parameters() if p.requires_grad}
    assert configured["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3 / 2)
    assert configured["lr_scheduler"]["interval"] == "step"


def test_the_optimizer_is_a_factory():
    module = Module()
    module.optimizer_factory = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    assert isinstance(module.configure_optimizers()["optimizer"], torch.optim.SGD)


class Line(TrainingModule):
    """loss = <weight, batch>: the gradient is the batch."""

    def __init__(self) -> None:
        super().__init__(partial(torch.optim.AdamW, lr=0.1, fused=True), Warmup(1), seed=0)
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return (self.weight * batch).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.seen.append(self.weight.grad.norm())


def fit(precision: str) -> Line:
    module = Line()
    trainer = pl.Trainer(
        accelerator="cpu", precision=precision, gradient_clip_val=0.5, max_steps=1, logger=False, barebones=True
    )
    trainer.fit(module, torch.utils.data.DataLoader([torch.tensor([3.0, 4.0])], batch_size=None))
    return module


def test_a_fused_optimizer_is_clipped_under_bf16():
    """Which Lightning's own clipping refuses."""
    module = fit("bf16-mixed")
    assert module.seen == [5.0]
    torch.testing.assert_close(module.weight.grad.norm(), torch.tensor(0.5))


def test_the_norm_is_logged_and_is_that_of_each_step(tmp_path: Path):
    module = Line()
    trainer = pl.Trainer(accelerator="cpu", gradient_clip_val=0.5, max_steps=2, logger=JsonlLogger(tmp_path, 1),
                         log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False)  # fmt: skip
    batches = [torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0])]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/gradient_norm"] for row in rows] == [5.0, 50.0]
    torch.testing.assert_close(module.weight.grad.norm(), torch.tensor(0.5))


def test_scaled_gradients_are_not_clipped():
    module = Line()
    module._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    with pytest.raises(UserError, match="16-mixed cannot clip gradients: use bf16-mixed"):
        module.configure_gradient_clipping(None, 1.0)


def test_moments_come_into_their_weights_layout(tmp_path: Path):
    """A checkpoint's may have another: channels_last has changed since, or FSDP wrote it; fused kernels read raw memory."""
    weight = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    moment = torch.arange(96.0).view(2, 3, 4, 4)
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": moment}
    module = Line()
    module._trainer = SimpleNamespace(optimizers=[optimizer])
    module.on_train_start()
    after = optimizer.state[weight]["exp_avg"]
    assert torch.equal(after, moment)
    assert after.stride() == weight.stride() != moment.stride()
