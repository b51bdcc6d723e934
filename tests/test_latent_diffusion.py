import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import SIDE, WordEncoder, batch, captions, first_stage, latent_diffusion, rows, silent
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.loss import LEVELS, Uncertainty
from ldm.diffusion.parameterization import V
from ldm.diffusion.sampling import Sampling
from ldm.diffusion.schedules import Karras, LogNormal
from ldm.diffusion.solvers import dpmpp_2m
from ldm.diffusion.weighting import Classical
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.training.ema import EMA


def test_the_training_loss_equals_a_hand_computation():
    """V-prediction with its classical weight: the mean squared error on v = (noise - sigma x0) / sqrt(1 + sigma^2)."""
    module, part = latent_diffusion(caption_dropout=0.5), batch(16)
    logged = silent(module)
    loss = module.training_step(part, 0)["loss"]

    random = KeyedRandom(0, part["index"])
    z = module.first_stage.latents(part, random)
    sigma = LogNormal()(random.uniform("t")).float().view(-1, 1, 1, 1)
    noise, scale = random.normal("noise", z.shape[1:]), (1 + sigma**2).sqrt()
    dropped = random.uniform("caption_dropout") < 0.5
    assert 2 < dropped.sum() < 14
    words = ["" if drop else caption for caption, drop in zip(part["caption"], dropped.tolist(), strict=True)]
    cond = module.conditioner({"caption": words})
    v = module.denoiser.backbone((z + sigma * noise) / scale, sigma.flatten().log() / 4, cond)
    by_sample = (v - (noise - sigma * z) / scale).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, by_sample.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logged["train/loss"], loss)


def shown(module) -> Conditioning:
    """What the backbone is conditioned on in a training step over 64 samples."""
    seen = []
    module.denoiser.backbone.register_forward_hook(lambda _, args, __: seen.append(args[2]))
    silent(module)
    module.training_step(batch(64), 0)
    return seen[0]


def test_caption_dropout_of_one_is_the_null_and_of_zero_never():
    module = latent_diffusion(caption_dropout=1.0)
    for part, null in zip(shown(module)[:3], module.conditioner.null(64)[:3], strict=True):
        assert torch.equal(part, null)
    module = latent_diffusion(caption_dropout=0.0)
    for part, kept in zip(shown(module)[:3], module.conditioner(batch(64))[:3], strict=True):
        assert torch.equal(part, kept)


def test_caption_dropout_has_its_probability():
    module = latent_diffusion(caption_dropout=0.1)
    module.conditioner.null(1)
    cond = Conditioning(torch.ones(20_000, 1, 1), torch.ones(20_000, 1, dtype=torch.bool), torch.ones(20_000, 0))
    null = Conditioning(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 0))
    module.conditioner.null = lambda n, cond=None: null
    share = 1 - module.drop(cond, KeyedRandom(0, torch.arange(20_000))).tokens.mean().item()
    assert share == pytest.approx(0.1, abs=0.01)


def test_a_sample_s_loss_does_not_depend_on_its_batch():
    module, part = latent_diffusion(caption_dropout=0.5), batch(6)
    silent(module)
    alone = [module.training_step(rows(part, [i]), 0)["loss"] for i in range(6)]
    for keep in ([0, 1, 2, 3, 4, 5], [4, 1], [5, 3, 0]):
        together = module.training_step(rows(part, keep), 0)["loss"]
        torch.testing.assert_close(together, torch.stack([alone[i] for i in keep]).mean(), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_denoiser_and_the_text_encoder_only():
    module = latent_diffusion()
    silent(module)
    module.training_step(batch(8), 0)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in module.denoiser.parameters())
    assert module.conditioner.encoder.table.weight.grad.any()
    assert all(p.grad is None for p in module.first_stage.parameters())


def test_the_average_includes_the_trained_text_encoder():
    module, ema = latent_diffusion(), EMA(0.5)
    trainer = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    name, start = "conditioner.encoder.table.weight", module.conditioner.encoder.table.weight.detach().clone()
    silent(module)
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step(batch(8), 0)["loss"].backward()
    optimizer.step()
    trainer.global_step = 1
    ema.on_train_batch_end(trainer, module)
    torch.testing.assert_close(ema.weights[name], 0.1 * start + 0.9 * module.conditioner.encoder.table.weight.detach())
    assert not any(key.startswith("first_stage") for key in ema.weights)


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_a_caption_dropout_that_is_no_probability_is_refused(dropout: float):
    with pytest.raises(UserError, match=rf"model.caption_dropout is {dropout}; .*\[0, 1\]"):
        latent_diffusion(caption_dropout=dropout)


def test_validation_is_the_loss_at_fixed_levels_without_dropout():
    module, part = latent_diffusion(caption_dropout=1.0), batch(4)
    logged = silent(module)
    module.validation_step(part, 0)
    random, cond = KeyedRandom(0, part["index"]), module.conditioner(part)
    z = module.first_stage.latents(part, random)
    levels = [module.loss.at_level(module.denoiser, z, cond, random, level)[0].mean() for level in range(LEVELS)]
    torch.testing.assert_close(torch.stack([logged[f"val/loss_level_{i}"] for i in range(LEVELS)]), torch.stack(levels))
    torch.testing.assert_close(logged["val/loss"], torch.stack(levels).mean())


def test_reconstruct_goes_through_the_first_stage_and_back():
    module, part = latent_diffusion(), batch(6)
    index = torch.tensor([4, 2])
    z = first_stage().latents(rows(part, [4, 2]), KeyedRandom(0, index))
    images = module.reconstruct(part["image"], [], index)
    torch.testing.assert_close(images, first_stage().decode(z))


SAMPLING = Sampling(dpmpp_2m, Karras(), Guidance(3.0), steps=4)


def sample(module, keep: list[int], seed: int = 0) -> Tensor:
    return module.sample(SAMPLING, [captions(6)[i] for i in keep], torch.tensor(keep), side=SIDE, seed=seed)


def test_a_picture_is_a_function_of_caption_index_and_seed():
    module = latent_diffusion().eval()
    together = sample(module, [0, 1, 2, 3, 4, 5])
    assert together.shape == (6, 3, SIDE, SIDE)
    assert not together.requires_grad
    torch.testing.assert_close(sample(module, [4, 2]), together[[4, 2]], rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(module, [0, 1, 2, 3, 4, 5]), together)
    assert (sample(module, [0], seed=1) - together[:1]).abs().max() > 0.01
    repeated = module.sample(SAMPLING, [captions(6)[0]] * 2, torch.tensor([0, 1]), side=SIDE, seed=0)
    assert (repeated[0] - repeated[1]).abs().max() > 0.01


def test_guidance_leads_away_from_a_negative_prompt():
    module, (caption, other) = latent_diffusion().eval(), captions(2)
    draw = lambda negative: module.sample(SAMPLING, [caption], torch.tensor([0]), SIDE, 0, negative)  # noqa: E731
    plain = module.sample(SAMPLING, [caption], torch.tensor([0]), SIDE, 0)
    assert torch.equal(draw(""), plain)
    assert (draw(other) - plain).abs().max() > 1e-3
    torch.testing.assert_close(  # away from itself is nowhere
        draw(caption), module.sample(replace(SAMPLING, guidance=Guidance()), [caption], torch.tensor([0]), SIDE, 0),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_a_learned_uncertainty_is_trained_and_saved():
    module = latent_diffusion(loss=Uncertainty(schedule=LogNormal(), weighting=Classical(V())))
    names = {id(p) for p in module.configure_optimizers()["optimizer"].param_groups[0]["params"]}
    assert id(module.loss.linear.weight) in names
    assert "loss.linear.weight" in module.state_dict()


def test_a_frozen_text_encoder_is_neither_trained_nor_saved():
    module = latent_diffusion()
    module.conditioner.requires_grad_(False)
    names = {id(p) for p in module.configure_optimizers()["optimizer"].param_groups[0]["params"]}
    assert names == {id(p) for p in module.denoiser.parameters()}
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"denoiser"}
    assert isinstance(module.conditioner.encoder, WordEncoder)


def test_pictures_for_a_batch_are_those_for_its_captions():
    module, part = latent_diffusion().eval(), batch(3)
    torch.testing.assert_close(module.sample_as(part, SAMPLING, 0), sample(module, [0, 1, 2]))


def test_guidance_without_caption_dropout_warns():
    arguments = (["red circle"], torch.tensor([0]), SIDE, 0)
    with pytest.warns(UserWarning, match=r"without caption dropout, .*model.caption_dropout=0.1"):
        latent_diffusion(caption_dropout=0.0).sample(replace(SAMPLING, guidance=Guidance(2.0)), *arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latent_diffusion(caption_dropout=0.0).sample(replace(SAMPLING, guidance=Guidance(1.0)), *arguments)
        latent_diffusion(caption_dropout=0.1).sample(replace(SAMPLING, guidance=Guidance(2.0)), *arguments)
