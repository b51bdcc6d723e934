from functools import partial
from types import SimpleNamespace

import torch
from tiny import adam, autoencoder, batch, rows, silent
from torch.nn.functional import l1_loss, mse_loss
from torchmetrics.image import PeakSignalNoiseRatio

from ldm.batch import to_unit
from ldm.keyed_random import KeyedRandom
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.optim import Warmup


def make(kl_weight: float = 1e-6, distance=mse_loss) -> AutoencoderModule:
    module = AutoencoderModule(autoencoder(), partial(distance, reduction="none"), kl_weight, adam, Warmup(1), seed=0)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda value, **_: value))
    return module


def validate(module: AutoencoderModule, parts: list) -> list[dict]:
    logged = silent(module)
    module.on_validation_epoch_start()
    values = []
    for i, part in enumerate(parts):
        module.validation_step(part, i)
        values.append(dict(logged))
    module.on_validation_epoch_end()
    return values


def test_the_training_loss_equals_a_hand_computation():
    module, part = make(kl_weight=0.5, distance=l1_loss), batch(4)
    logged = silent(module)
    loss = module.training_step(part, 0)
    images = to_unit(part["image"])
    posterior = module.autoencoder.encode(images)
    noise = KeyedRandom(0, part["index"]).normal("posterior", posterior.mean.shape[1:])
    distance = (module.autoencoder.decode(posterior.sample(noise)) - images).abs()
    by_sample = distance.sum(dim=(1, 2, 3)) + 0.5 * posterior.kl()  # per element in the loss: over an image's elements
    torch.testing.assert_close(loss, by_sample.mean() / images[0].numel())
    torch.testing.assert_close(logged["train/kl"], posterior.kl().mean())
    torch.testing.assert_close(logged["train/distance"], distance.mean())


def test_a_sample_s_loss_does_not_depend_on_its_batch():
    module, part = make(kl_weight=0.5), batch(4)
    silent(module)
    alone = torch.stack([module.training_step(rows(part, [i]), 0) for i in range(4)])
    torch.testing.assert_close(module.training_step(part, 0), alone.mean())


def test_gradients_reach_every_weight():
    module = make(kl_weight=1.0)
    silent(module)
    module.training_step(batch(2), 0).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_latent_statistics_equal_a_direct_computation():
    """The mean and standard deviation of posterior samples: of the mixture of all posteriors, by channel."""
    module = make()
    assert module.latent_mean.isnan().all()
    parts = [batch(5), batch(3, start=5)]
    validate(module, parts)
    posterior = module.autoencoder.encode(torch.cat([to_unit(part["image"]) for part in parts]))
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
    expected = mean.mean(dim=(0, 2, 3))
    spread = variance.mean(dim=(0, 2, 3)) + (mean - expected.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(module.latent_mean, expected.float())
    torch.testing.assert_close(module.latent_std, spread.sqrt().float())
    samples = torch.cat([posterior.sample(torch.randn(8, 2, 4, 4)) for _ in range(200)])
    torch.testing.assert_close(module.latent_std, samples.std(dim=(0, 2, 3)), rtol=0.02, atol=0)
    assert {"latent_mean", "latent_std"} <= module.state_dict().keys()


def test_each_validation_measures_anew():
    module = make()
    validate(module, [batch(4)])
    first = module.latent_mean.clone()
    validate(module, [batch(4, start=50)])
    assert not torch.equal(module.latent_mean, first)
    validate(module, [batch(4)])
    assert torch.equal(module.latent_mean, first)


def test_psnr_equals_torchmetrics_image_by_image():
    module, part = make(), batch(4)
    values = validate(module, [part])[0]
    images = to_unit(part["image"])
    posterior = module.autoencoder.encode(images)
    reconstruction = module.autoencoder.decode(posterior.mean).clamp(-1, 1)
    each = []
    for a, b in zip(reconstruction, images, strict=True):
        metric = PeakSignalNoiseRatio(data_range=2.0)
        each.append(metric(a, b))
        torch.testing.assert_close(each[-1], 10 * torch.log10(4 / (a - b).square().mean()))
    torch.testing.assert_close(values["val/psnr"], torch.stack(each).mean())
    torch.testing.assert_close(values["val/kl"], posterior.kl().mean())
    torch.testing.assert_close(values["val/distance"], mse_loss(reconstruction, images))


def test_reconstruct_is_the_posterior_s_mean_decoded():
    module, part = make(), batch(2)
    mean = module.autoencoder.encode(to_unit(part["image"])).mean
    images = module.reconstruct(part)
    assert torch.equal(images, module.autoencoder.decode(mean))
    assert not images.requires_grad
