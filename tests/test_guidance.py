import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.parameterization import X0, Eps, Flow, V
from ldm.errors import UserError


class Network(nn.Module):
    """F depends on everything it is given; counts its rows."""

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        self.rows = [*getattr(self, "rows", []), len(x)]
        return torch.sin(x + c_noise.view(-1, 1, 1, 1)) + cond.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def make(rows: int, seed: int) -> Conditioning:
    tokens = torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(seed))
    return Conditioning(tokens, torch.ones(rows, 3, dtype=torch.bool), torch.zeros(rows, 0))


X, SIGMA = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(9)), torch.tensor([0.1, 1.0, 10.0])
COND, NULL = make(3, 0), make(1, 1)
NULL_3 = Conditioning(*(None if part is None else part.repeat(3, *[1] * (part.dim() - 1)) for part in NULL))


@pytest.mark.parametrize("parameterization", [Eps(), V(), Flow(), X0()], ids=str)
def test_guidance_on_d_is_guidance_on_the_prediction(parameterization):
    """F_null + scale·(F_cond − F_null), and D of that: what the literature does with ε."""
    network = Network()
    guided = ClassifierFree(4.0)(Denoiser(network, parameterization), COND, NULL)(X, SIGMA)
    c_skip, c_out, c_in, c_noise = parameterization.coefficients(SIGMA)
    c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in (c_skip, c_out, c_in))
    f_cond, f_null = network(c_in * X, c_noise, COND), network(c_in * X, c_noise, NULL_3)
    expected = c_skip * X + c_out * (f_null + 4 * (f_cond - f_null))
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "only"), [(1, COND), (1.0, COND), (0.0, NULL_3)])
def test_scale_one_and_zero_are_one_plain_call(scale: float, only: Conditioning):
    network = Network()
    denoiser = Denoiser(network, V())
    out = ClassifierFree(scale)(denoiser, COND, NULL)(X, SIGMA)
    assert network.rows == [3]
    torch.testing.assert_close(out, denoiser(X, SIGMA, only), rtol=0, atol=1e-6)
    nearby = ClassifierFree(scale + 1e-7)(denoiser, COND, NULL)(X, SIGMA)
    torch.testing.assert_close(nearby, out, rtol=0, atol=5e-6)


@pytest.mark.parametrize("null", [NULL, NULL_3])
def test_other_scales_are_one_batched_call(null: Conditioning):
    network = Network()
    denoiser = Denoiser(network, V())
    out = ClassifierFree(2.5)(denoiser, COND, null)(X, SIGMA)
    assert network.rows == [6]
    d_cond, d_null = denoiser(X, SIGMA, COND), denoiser(X, SIGMA, NULL_3)
    torch.testing.assert_close(out, 2.5 * d_cond - 1.5 * d_null, rtol=1e-5, atol=1e-5)


def test_spatial_conditioning_is_guided_too():
    cond, null = COND._replace(spatial=torch.ones(3, 1, 4, 4)), NULL._replace(spatial=torch.zeros(1, 1, 4, 4))
    denoiser = Denoiser(nn.Module(), X0())
    denoiser.backbone.forward = lambda x, c_noise, cond: x[:, 2:].expand(-1, 2, -1, -1)
    torch.testing.assert_close(ClassifierFree(3.0)(denoiser, cond, null)(X, SIGMA), torch.full_like(X, 3.0))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_bad_scale(scale: float):
    with pytest.raises(UserError, match=r"guidance scale is .* >= 0"):
        ClassifierFree(scale)
