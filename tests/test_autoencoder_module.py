from functools import partial
from types import SimpleNamespace

import torch
from tiny import adam, autoencoder, batch, rows, silent
from torch.nn.functional import l1_loss, mse_loss
from torchmetrics.image import PeakSignalNoiseRatio

from ldm.batch import to_unit
from ldm.keyed_random import KeyedRandom
from ldm.models.autoencoder_vq import AutoencoderVQ
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.quantizer import VectorQuantizer
from ldm.training import levers
from ldm.training.adversarial import Adversary, Hinge
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.optim import Warmup
from ldm.training.reconstruction_loss import ReconstructionLoss


def make(penalty_weight: float = 1e-6, distance=mse_loss, network=None, **options) -> AutoencoderModule:
    loss = ReconstructionLoss(partial(distance, reduction="none"))
    module = AutoencoderModule(network or autoencoder(), loss, penalty_weight, adam, Warmup(1), seed=0, **options)
    module._trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda value, **_: value), global_step=0, log_every_n_steps=1
    )
    return module


def validate(module: AutoencoderModule, parts: list) -> list[dict]:
    logged = silent(module)
    module.on_validation_epoch_start()
    values = []
    for i, part in enumerate(parts):
        module.validation_step(part, i)
        values.append(dict(logged))
    module.on_validation_epoch_end()
    return [*values, dict(logged)]


def test_the_training_loss_equals_a_hand_computation():
    module, part = make(penalty_weight=0.5, distance=l1_loss), batch(4)
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
    module, part = make(penalty_weight=0.5), batch(4)
    silent(module)
    alone = torch.stack([module.training_step(rows(part, [i]), 0) for i in range(4)])
    torch.testing.assert_close(module.training_step(part, 0), alone.mean())


def test_gradients_reach_every_weight():
    module = make(penalty_weight=1.0)
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
    values = validate(module, [part])[-1]
    images = to_unit(part["image"])
    posterior = module.autoencoder.encode(images)
    reconstruction = module.autoencoder.decode(posterior.mean).clamp(-1, 1)
    each = []
    for a, b in zip(reconstruction, images, strict=True):
        metric = PeakSignalNoiseRatio(data_range=2.0)
        each.append(metric(a, b))
        torch.testing.assert_close(each[-1], 10 * torch.log10(4 / (a - b).square().mean()))
    torch.testing.assert_close(values["val/psnr"], torch.stack(each).mean())
    torch.testing.assert_close(values["val/kl"].float(), posterior.kl().mean())
    torch.testing.assert_close(values["val/distance"], mse_loss(reconstruction, images))


def test_reconstruct_is_the_posterior_s_mean_decoded():
    module, part = make(), batch(2)
    mean = module.autoencoder.encode(to_unit(part["image"])).mean
    images = module.reconstruct(part["image"], part["caption"], torch.tensor([0, 1]))
    assert torch.equal(images, module.autoencoder.decode(mean))
    assert not images.requires_grad


def adversary(**options) -> Adversary:
    torch.manual_seed(0)
    network = PatchDiscriminator(4, layers=1, batch_norm=False, spectral=True)
    return Adversary(network, Hinge(), **({"start": 0} | options))


def gradients(module: AutoencoderModule, part) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module.training_step(part, 0).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def with_step(module: AutoencoderModule, step: int) -> AutoencoderModule:
    silent(module)
    module._trainer = SimpleNamespace(global_step=step, log_every_n_steps=1000)
    return module


def test_neither_adversary_s_loss_reaches_the_other_s_weights():
    """One backward pass gives each the gradient of its own loss alone."""
    both, part = with_step(make(1e-6, adversary=adversary(adaptive=False, weight=1.0)), 7), batch(4)
    both.train(False)  # else the spectral norms' iterations move between the two computations
    got = gradients(both, part)
    images = to_unit(part["image"])
    coded = both.autoencoder.code(images, KeyedRandom(0, part["index"]))
    fake = both.autoencoder.decode_coded(coded.latents)
    nets = dict(both.adversary.discriminator.named_parameters())
    logits = both.adversary.discriminator(fake)
    terms = both.loss(fake, images).loss + 1e-6 / images[0].numel() * coded.penalty.mean() - logits.mean()
    ours = dict(both.autoencoder.named_parameters())
    for (name, _), slope in zip(ours.items(), torch.autograd.grad(terms, list(ours.values())), strict=True):
        torch.testing.assert_close(got[f"autoencoder.{name}"], slope, rtol=1e-3, atol=1e-6)
    judged = Hinge().discriminator(both.adversary.discriminator(images), both.adversary.discriminator(fake.detach()))
    for (name, _), slope in zip(nets.items(), torch.autograd.grad(judged, list(nets.values())), strict=True):
        torch.testing.assert_close(got[f"adversary.discriminator.{name}"], slope, rtol=1e-3, atol=1e-6)


def test_the_adversary_starts_at_its_step_and_says_nothing_before():
    plain, part = gradients(with_step(make(), 0), batch(4)), batch(4)
    for step in (0, 1, 2):
        module = with_step(make(adversary=adversary(start=2)), step)
        got = gradients(module, part)
        theirs = [g for name, g in got.items() if name.startswith("adversary")]
        assert all(g is not None for g in theirs)  # DDP waits for each
        assert any(g.any() for g in theirs) == (step == 2)
        same = [torch.equal(got[name], slope) for name, slope in plain.items()]
        assert all(same) if step < 2 else not any(same[:3])


def test_both_parts_are_clipped_each_by_its_own_norm():
    module = with_step(make(adversary=adversary()), 5)
    module._trainer.precision_plugin = SimpleNamespace(scaler=None)
    module.training_step(batch(4), 0).backward()
    module.configure_gradient_clipping(None, 0.01)
    parts = module.clipped_apart()
    assert sum(map(len, parts)) == len(list(module.parameters()))
    for part in parts:
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in part]).norm(), torch.tensor(0.01))


def test_accumulated_micro_batches_are_the_large_batch():
    part = batch(4)
    module = with_step(make(0.5, adversary=adversary(adaptive=False)), 5)
    module.train(False)  # as above
    whole = gradients(module, part)
    halves = [gradients(module, rows(part, keep)) for keep in ([0, 1], [2, 3])]
    for name, slope in whole.items():
        torch.testing.assert_close(slope, (halves[0][name] + halves[1][name]) / 2, rtol=1e-3, atol=1e-6)


def test_a_vector_quantized_one_learns():
    torch.manual_seed(0)
    network = AutoencoderVQ(2, VectorQuantizer(16, 2, decay=0.9, revive_below=0.1), 4, [1, 2], blocks=1, groups=2)
    module = make(1.0, network=network)
    logged = silent(module)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = module.training_step(batch(4, start=4 * (step % 2)), 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # of noise, 16 codes keep little
    assert "train/codebook" in logged
    assert validate(module, [batch(4)])[-1]["val/usage"] > 0.3


def test_a_compiled_autoencoder_goes_on_when_its_adversary_starts():
    """After a step without one, whose graph torch would otherwise give away in its one backward pass."""
    module, part = with_step(make(adversary=adversary(start=1)), 0), batch(4)
    levers.Levers(["autoencoder.decoder"], compile="aot_eager").setup(SimpleNamespace(strategy=None), module, "fit")
    gradients(module, part)
    with_step(module, 1)
    compiled, plain = gradients(module, part), gradients(with_step(make(adversary=adversary(start=1)), 1), part)
    name = "autoencoder.decoder.conv_out.weight"
    torch.testing.assert_close(compiled[name], plain[name], rtol=1e-3, atol=1e-5)
