import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import LEVELS, DenoisingLoss
from ldm.diffusion.parameterization import EDM, X0, Eps, Flow, Parameterization, V
from ldm.diffusion.schedules import Karras, LogNormal
from ldm.diffusion.weighting import Classical, MinSNR, uniform
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


@pytest.mark.parametrize("parameterization", [Eps(), V(), X0(), Flow(), EDM()], ids=str)
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
