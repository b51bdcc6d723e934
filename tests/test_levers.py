"""Each lever on speed is on here once, and changes no result."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_config import composed
from test_configs import NAMED
from tiny import batch, latent_diffusion, silent

from ldm import config
from ldm.errors import UserError
from ldm.training.latent_diffusion import LatentDiffusionModule
from ldm.training.levers import Levers
from ldm.training.strategies import FullySharded

BACKBONE = ["denoiser.backbone"]
TRAINER = SimpleNamespace(strategy=None)


def step(module: LatentDiffusionModule, **levers: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A training step's loss and gradients."""
    Levers(BACKBONE, **levers).setup(TRAINER, module, "fit")
    silent(module)
    loss = module.training_step(batch(4), 0)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def plain() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return step(latent_diffusion())


@pytest.mark.parametrize("levers", [{"compile": "aot_eager"}, {"channels_last": True}], ids=str)
def test_the_same_loss_and_gradients(plain: tuple, levers: dict[str, Any]):
    loss, gradients = step(latent_diffusion(), **levers)
    torch.testing.assert_close(loss, plain[0])
    torch.testing.assert_close(gradients, plain[1], rtol=1e-4, atol=1e-5)


def test_a_compiled_network_runs_compiled_under_its_own_names():
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        seen.append(type(graph).__name__)
        return graph

    module = latent_diffusion()
    names = [*module.state_dict()]
    step(module, compile=backend)
    assert seen
    assert [*module.state_dict()] == names
    assert not any("_orig_mod" in name for name in names)


def test_convolutions_are_laid_out_channels_last():
    module = latent_diffusion()
    step(module, channels_last=True)
    weight = module.denoiser.backbone.out[-1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert module.first_stage.autoencoder.decoder.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("name", ["latent_diffusion", "autoencoder"])
def test_the_configs_name_networks_that_are_there(name: str):
    cfg = composed("train", f"model={name}", f"callbacks={name}", "model/first_stage=pixels" if name == "latent_diffusion" else
                   "model.seed=0", *NAMED)  # fmt: skip
    with torch.device("meta"):
        module = config.build(cfg.model)
    levers = config.build(cfg.callbacks.levers)
    assert (levers.compile, levers.channels_last) == (None, False)
    levers.setup(TRAINER, module, "fit")
    assert all(p.requires_grad for network in levers.networks for p in module.get_submodule(network).parameters())


def test_fused_adamw_is_the_default():
    cfg = composed("train", *NAMED)
    assert cfg.model.optimizer.fused is True
    optimizer: partial = config.build(cfg.model.optimizer)
    assert optimizer([torch.nn.Parameter(torch.ones(2))]).defaults["fused"] is True


def test_a_network_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"callbacks.levers.networks: denoiser.bckbone is no network of a LatentDiff"):
        Levers(["denoiser.bckbone"]).setup(TRAINER, latent_diffusion(), "fit")


def test_channels_last_under_fsdp_is_refused():
    with pytest.raises(UserError, match="channels_last=true: FSDP cuts plain weights only; use trainer=ddp"):
        Levers(BACKBONE, channels_last=True).setup(
            SimpleNamespace(strategy=FullySharded(1, 60)), latent_diffusion(), "fit"
        )
