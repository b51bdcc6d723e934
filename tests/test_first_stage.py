import pytest
import torch
from tiny import SIDE, autoencoder, batch, first_stage, rows

from ldm.batch import Batch, to_unit
from ldm.keyed_random import KeyedRandom
from ldm.models.first_stage import FirstStage, Pixels


def test_latents_are_normalized_posterior_samples():
    stage, part = first_stage(), batch(4)
    random = KeyedRandom(0, part["index"])
    posterior = stage.autoencoder.encode(to_unit(part["image"]))
    z = posterior.sample(random.normal("posterior", (2, SIDE // 2, SIDE // 2)))
    mean, std = torch.tensor([0.5, -0.25]).view(1, 2, 1, 1), torch.tensor([2.0, 0.5]).view(1, 2, 1, 1)
    latents = stage.latents(part, random)
    torch.testing.assert_close(latents, (z - mean) / std)
    torch.testing.assert_close(stage.decode(latents), stage.autoencoder.decode(z))
    assert latents.shape[1:] == stage.latent_shape(SIDE)


def test_normalization_gives_unit_latents_from_the_measured_statistics():
    part = batch(16)
    index = part["index"]
    raw = FirstStage(autoencoder(), [0, 0], [1, 1]).latents(part, KeyedRandom(0, index))
    mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
    z = FirstStage(autoencoder(), mean.tolist(), std.tolist()).latents(part, KeyedRandom(0, index))
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), torch.ones(2), rtol=0, atol=1e-4)


def test_is_frozen_and_stays_in_evaluation_mode():
    stage = torch.nn.Sequential(first_stage()).train()[0]
    assert not any(module.training for module in stage.modules())
    assert not any(p.requires_grad for p in stage.parameters())
    z = stage.latents(batch(2), KeyedRandom(0, torch.arange(2)))
    assert not z.requires_grad
    assert not stage.decode(z.requires_grad_()).requires_grad


def test_the_posterior_s_noise_belongs_to_the_sample():
    stage, part = first_stage(), batch(4)
    together = stage.latents(part, KeyedRandom(0, part["index"]))
    some = rows(part, [2, 1])
    torch.testing.assert_close(stage.latents(some, KeyedRandom(0, some["index"])), together[[2, 1]])
    other = stage.latents(part, KeyedRandom(0, part["index"] + 100))
    assert (other - together).abs().mean() > 0.01


@pytest.mark.parametrize("side", [8, 32])
def test_pixels_are_their_own_latents(side: int):
    part, stage = batch(2, side=side), Pixels()
    z = stage.latents(part, KeyedRandom(0, part["index"]))
    assert torch.equal(z, to_unit(part["image"]))
    assert torch.equal(stage.decode(z), z)
    assert stage.latent_shape(side) == (3, side, side) == tuple(z.shape[1:])


def test_cached_moments_give_the_latents_of_the_pictures():
    stage, part = first_stage(), batch(4)
    moments = stage.moments(part["image"])
    assert (moments.dtype, moments.shape) == (torch.float16, (4, 4, SIDE // 2, SIDE // 2))
    cached, random = Batch(moments=moments, index=part["index"]), KeyedRandom(0, part["index"])
    torch.testing.assert_close(stage.latents(cached, random), stage.latents(part, random), rtol=1e-3, atol=1e-3)
    assert stage.shape_of(cached) == stage.shape_of(part) == stage.latent_shape(SIDE)
    assert Pixels().shape_of(part) == Pixels().latent_shape(SIDE)


def test_the_logvar_in_a_cache_is_clipped_and_fits_float16():
    stage = first_stage()
    stage.autoencoder.quant_conv.bias.data[2:] = 1e6
    assert stage.moments(batch(1)["image"])[:, 2:].unique().tolist() == [20]


def test_moments_depend_on_the_encoder_alone():
    names = set(first_stage().encoder_state())
    assert {name.split(".")[0] for name in names} == {"encoder", "quant_conv"}
    stage, part = first_stage(), batch(2)["image"]
    before = stage.moments(part)
    for name, weight in stage.autoencoder.named_parameters():
        if name not in names:
            weight.data += 1
    stage.mean += 1
    assert torch.equal(stage.moments(part), before)
    assert Pixels().encoder_state() == {}
