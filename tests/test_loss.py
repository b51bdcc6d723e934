import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import LEVELS, DenoisingLoss, Stratified, Uncertainty, independent
from ldm.diffusion.parameterization import EDM, X0, Eps, Flow, Parameterization, V
from ldm.diffusion.schedules import Karras, LogNormal
from ldm.diffusion.weighting import Classical, MinSNR, uniform
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom


def conditioning(rows: int) -> Conditioning:
    return Conditioning(torch.zeros(rows, 1, 1), torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, 0))


def network(x: Tensor, c_noise: Tensor, cond: Conditioning | None = None) -> Tensor:
    return torch.tanh(1.3 * x + c_noise.view(-1, 1, 1, 1)) + 0.1


class Network(nn.Module):
    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        return network(x, c_noise)


INDEX = torch.arange(16)
Z = KeyedRandom(1, INDEX).normal("latents", (4, 8, 8))


@pytest.mark.parametrize("parameterization", [Eps(), V(), X0(), Flow(), EDM()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("weighting", [None, MinSNR(5.0)], ids=["classical", "min-SNR"])
def test_float32_is_within_a_thousandth_of_float64(parameterization: Parameterization, weighting):
    weighting = weighting or Classical(parameterization)
    noise = KeyedRandom(0, INDEX).normal("noise", (4, 8, 8)).double()
    worst = 0.0
    for exponent in range(-4, 5):
        sigma = torch.full((16,), 10.0**exponent, dtype=torch.float64)
        loss, used = DenoisingLoss(lambda t, sigma=sigma: sigma, weighting)(
            Denoiser(Network(), parameterization), Z, conditioning(16), KeyedRandom(0, INDEX)
        )
        assert loss.dtype == used.dtype == torch.float32
        c_skip, c_out, c_in, c_noise = parameterization.coefficients(sigma)
        x = Z.double() + sigma[0] * noise
        error = c_skip[0] * x + c_out[0] * network(c_in[0] * x, c_noise) - Z.double()
        expected = weighting(sigma) * error.square().mean(dim=(1, 2, 3))
        worst = max(worst, (loss / expected - 1).abs().max().item())
    assert worst < 1e-3


class Remember(nn.Module):
    """A denoiser that returns 0 and keeps what it was shown."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.x, self.sigma = x, sigma
        return torch.zeros_like(x)


def test_draws_sigma_and_noise_by_sample():
    denoiser, loss = Remember(), DenoisingLoss(LogNormal(), uniform)
    value, sigma = loss(denoiser, Z, conditioning(16), KeyedRandom(0, INDEX))
    assert value.shape == sigma.shape == (16,)
    torch.testing.assert_close(value, Z.square().mean(dim=(1, 2, 3)))
    assert torch.equal(denoiser.sigma, sigma)
    assert torch.equal(sigma, LogNormal()(KeyedRandom(0, INDEX).uniform("t")).float())
    noise = (denoiser.x - Z) / sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(noise, KeyedRandom(0, INDEX).normal("noise", (4, 8, 8)), rtol=1e-3, atol=1e-3)
    part, _ = loss(denoiser, Z[3:5], conditioning(2), KeyedRandom(0, INDEX[3:5]))
    torch.testing.assert_close(part, value[3:5])


def test_half_precision_latents_are_widened():
    value, _ = DenoisingLoss(LogNormal(), uniform)(Remember(), Z.half(), conditioning(16), KeyedRandom(0, INDEX))
    torch.testing.assert_close(value, Z.half().float().square().mean(dim=(1, 2, 3)))


def test_levels_are_fixed_quantiles_with_their_own_noise():
    denoiser, loss, random = Remember(), DenoisingLoss(Karras(), uniform), KeyedRandom(0, INDEX)
    seen = []
    for level in range(LEVELS):
        value, sigma = loss.at_level(denoiser, Z, conditioning(16), random, level)
        assert value.shape == (16,)
        torch.testing.assert_close(sigma, Karras()(torch.full((16,), (level + 0.5) / 8)).float())
        seen.append((denoiser.x - Z) / sigma.view(-1, 1, 1, 1))
        loss.at_level(denoiser, Z, conditioning(16), random, level)
        assert torch.equal(
            denoiser.x, Z + sigma.view(-1, 1, 1, 1) * random.normal(f"validation noise {level}", (4, 8, 8))
        )
    correlation = torch.corrcoef(torch.stack(seen[2:]).flatten(1)) - torch.eye(LEVELS - 2)
    assert correlation.abs().max() < 0.07
    with pytest.raises(AssertionError, match="level 8"):
        loss.at_level(denoiser, Z, conditioning(16), random, LEVELS)


def test_stratified_t_is_one_in_each_part_of_the_global_batch():
    draw = Stratified(8)
    t = draw(KeyedRandom(0, torch.arange(24)))
    for batch in t.view(3, 8):
        assert (batch * 8).long().sort().values.tolist() == list(range(8))
    shares = [t[i] - t[i - i % 8] for i in range(24)]
    assert len({round(float(s) % 1, 9) for s in shares}) == 8  # one shared draw a batch
    assert t[0] != t[8]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stratified_t_belongs_to_the_sample_on_any_number_of_ranks(ranks: int):
    whole = Stratified(8)(KeyedRandom(0, torch.arange(16)))
    parts = [Stratified(8)(KeyedRandom(0, torch.arange(rank, 16, ranks))) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, whole[rank::ranks])


@pytest.mark.parametrize("draw", [independent, Stratified(4)])
def test_t_is_uniform(draw):
    t = draw(KeyedRandom(0, torch.arange(40_000)))
    assert 0 <= t.min() < t.max() < 1
    histogram = torch.histc(t, 10, 0, 1) / len(t)
    torch.testing.assert_close(histogram, torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=0.005)


def test_stratified_t_has_less_variance_in_the_batch_mean():
    random = KeyedRandom(0, torch.arange(64 * 200))
    spread = [draw(random).view(200, 64).mean(dim=1).std().item() for draw in (independent, Stratified(64))]
    assert spread[1] < 0.2 * spread[0]


def test_offset_noise_adds_one_number_per_sample_and_channel():
    plain, offset = Remember(), Remember()
    random = KeyedRandom(0, INDEX)
    DenoisingLoss(Karras(), uniform)(plain, Z, conditioning(16), random)
    DenoisingLoss(Karras(), uniform, offset_noise=0.5)(offset, Z, conditioning(16), random)
    extra = (offset.x - plain.x) / plain.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(extra, extra.mean(dim=(2, 3), keepdim=True).expand_as(extra), rtol=1e-3, atol=1e-4)
    assert extra.std().item() == pytest.approx(0.5, abs=0.1)
    assert extra.mean(dim=(2, 3)).unique().numel() == 64


@pytest.mark.parametrize("parameterization", [Eps(), V(), X0(), Flow(), EDM()], ids=lambda each: type(each).__name__)
def test_input_perturbation_moves_the_input_and_not_the_target_of_f(parameterization: Parameterization):
    """Ning et al. 2023, algorithm 1: |F(x with ε + γξ) − F's target for (z, ε)|², in terms of F."""
    random = KeyedRandom(0, INDEX)
    loss = DenoisingLoss(LogNormal(0, 1), Classical(parameterization), input_perturbation=0.3)
    ours, sigma = loss(Denoiser(Network(), parameterization), Z, conditioning(16), random)
    column = sigma.view(-1, 1, 1, 1)
    noise, xi = random.normal("noise", (4, 8, 8)), random.normal("input perturbation", (4, 8, 8))
    c_skip, c_out, c_in, c_noise = parameterization.coefficients(sigma)
    c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in (c_skip, c_out, c_in))
    f = network(c_in * (Z + column * (noise + 0.3 * xi)), c_noise)
    target = (Z - c_skip * (Z + column * noise)) / c_out
    torch.testing.assert_close(ours, (f - target).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_validation_is_without_offset_and_perturbation():
    random, levels = KeyedRandom(0, INDEX), []
    for options in ({}, {"offset_noise": 0.5, "input_perturbation": 0.5}):
        loss = DenoisingLoss(Karras(), uniform, **options)
        levels.append(loss.at_level(Denoiser(Network(), V()), Z, conditioning(16), random, 3)[0])
    assert torch.equal(*levels)


def test_uncertainty_is_the_loss_before_it_has_learned():
    arguments = {"schedule": LogNormal(), "weighting": Classical(EDM())}
    inputs = (Denoiser(Network(), EDM()), Z, conditioning(16), KeyedRandom(0, INDEX))
    loss = Uncertainty(**arguments)
    torch.testing.assert_close(loss(*inputs)[0], DenoisingLoss(**arguments)(*inputs)[0])
    assert torch.equal(loss.at_level(*inputs, 2)[0], DenoisingLoss(**arguments).at_level(*inputs, 2)[0])


def test_uncertainty_learns_the_logarithm_of_the_expected_loss():
    """min over u of l/e^u + u is u = log l (Karras et al. 2024, equation 15)."""
    loss = Uncertainty(schedule=LogNormal(0.0, 1.0), weighting=lambda sigma: sigma**2)
    remember, z = Remember(), torch.ones(512, 1, 1, 1)  # |0 − z|² = 1: the loss is σ²
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for step in range(200):
        index = torch.arange(512) + 512 * step
        value, sigma = loss(remember, z, conditioning(512), KeyedRandom(0, index))
        optimizer.zero_grad()
        value.mean().backward()
        optimizer.step()
    middle = (sigma > 0.3) & (sigma < 3)
    torch.testing.assert_close(value[middle], 1 + 2 * sigma[middle].log(), rtol=0, atol=0.25)


@pytest.mark.parametrize("options", [{"offset_noise": -0.1}, {"input_perturbation": float("nan")}])
def test_bad_options(options: dict[str, float]):
    with pytest.raises(UserError, match=r"loss.(offset_noise|input_perturbation) is .* >= 0"):
        DenoisingLoss(Karras(), uniform, **options)


def test_bad_batch_size():
    with pytest.raises(UserError, match="batch_size is 0"):
        Stratified(0)
