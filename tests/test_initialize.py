import pytest
import torch
from tiny import batch, latent_diffusion, randomized, silent, unet
from torch import nn

from ldm.errors import UserError
from ldm.training.ema import trainable
from ldm.training.initialize import start_from


def test_a_run_starts_as_the_other_one():
    other, module = latent_diffusion(), latent_diffusion(backbone=randomized(unet(), 5))
    silent(other), silent(module)
    assert other.training_step(batch(2), 0)["loss"] != module.training_step(batch(2), 0)["loss"]
    start_from(module, trainable(other), "runs/x")
    assert other.training_step(batch(2), 0)["loss"] == module.training_step(batch(2), 0)["loss"]


def test_new_input_channels_start_at_zero():
    def wide(channels: int) -> nn.Module:
        module = latent_diffusion()
        module.denoiser.backbone.input_blocks[0][0] = nn.Conv2d(channels, 8, 3, padding=1)
        return module

    old, new = wide(2), wide(5)
    start_from(new, trainable(old), "runs/x")
    weight = new.denoiser.backbone.input_blocks[0][0].weight
    assert torch.equal(weight[:, :2], old.denoiser.backbone.input_blocks[0][0].weight)
    assert not weight[:, 2:].any()


def test_other_networks_are_refused_by_name():
    module = latent_diffusion()
    weights = trainable(module)
    name = "denoiser.backbone.out.2.weight"
    with pytest.raises(UserError, match=f"init_from=runs/x lacks {name}"):
        start_from(module, {k: v for k, v in weights.items() if k != name}, "runs/x")
    with pytest.raises(UserError, match="has, and this model does not train, extra"):
        start_from(module, weights | {"extra": torch.zeros(1)}, "runs/x")
    with pytest.raises(
        UserError, match=r"has denoiser.backbone.out.2.weight as \(2, 2\), this model as \(2, 8, 3, 3\)"
    ):
        start_from(module, weights | {name: torch.zeros(2, 2)}, "runs/x")
