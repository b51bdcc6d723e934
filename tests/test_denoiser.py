import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import EDM, X0, Eps, Flow, Parameterization, V


def conditioning(rows: int, spatial: Tensor | None = None) -> Conditioning:
    return Conditioning(torch.zeros(rows, 2, 3), torch.ones(rows, 2, dtype=torch.bool), torch.zeros(rows, 0), spatial)


class Spy(nn.Module):
    """Remembers its inputs; predicts `value` in `dtype`."""

    def __init__(self, value: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.value, self.dtype = value, dtype

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        self.seen = (x, c_noise, cond)
        return torch.full_like(x[:, :4], self.value, dtype=self.dtype)


@pytest.mark.parametrize("parameterization", [Eps(), V(), X0(), Flow(), EDM()], ids=lambda each: type(each).__name__)
def test_the_backbone_wears_its_coat(parameterization: Parameterization):
    x, sigma, cond = torch.randn(3, 4, 2, 2), torch.tensor([0.1, 1.0, 14.0]), conditioning(3)
    spy = Spy()
    x0_hat = Denoiser(spy, parameterization)(x, sigma, cond)
    c_skip, c_out, c_in, c_noise = parameterization.coefficients(sigma)
    for row in range(3):
        torch.testing.assert_close(x0_hat[row], c_skip[row] * x[row] + c_out[row] * 0.5)
        torch.testing.assert_close(spy.seen[0][row], c_in[row] * x[row])
    assert torch.equal(spy.seen[1], c_noise)
    assert spy.seen[2] is cond


def test_a_scalar_sigma_is_for_every_row():
    x, spy = torch.randn(3, 4, 2, 2), Spy()
    denoiser = Denoiser(spy, Eps())
    assert torch.equal(
        denoiser(x, torch.tensor(2.0), conditioning(3)), denoiser(x, torch.full((3,), 2.0), conditioning(3))
    )
    assert spy.seen[1].shape == (3,)


def test_spatial_conditioning_is_stacked_and_not_scaled():
    spy, spatial = Spy(), torch.randn(2, 3, 2, 2)
    x0_hat = Denoiser(spy, V())(torch.randn(2, 4, 2, 2), torch.tensor(5.0), conditioning(2, spatial))
    assert torch.equal(spy.seen[0][:, 4:], spatial)
    assert x0_hat.shape == (2, 4, 2, 2)


@pytest.mark.parametrize("spatial", [None, torch.arange(24.0).view(6, 1, 2, 2)], ids=["text", "spatial"])
def test_several_conditions_of_one_x_are_rows_of_one_call(spatial: Tensor | None):
    x, sigma, spy = torch.randn(3, 4, 2, 2), torch.tensor([0.1, 1.0, 14.0]), Spy()
    cond = conditioning(6, spatial)
    x0_hat = Denoiser(spy, V())(x, sigma, cond)
    assert torch.equal(x0_hat, Denoiser(Spy(), V())(torch.cat([x, x]), torch.cat([sigma, sigma]), cond))
    assert len(spy.seen[0]) == len(spy.seen[1]) == 6


@pytest.mark.parametrize("autocast", [False, True])
def test_the_coat_is_float32_around_a_bfloat16_backbone(autocast: bool):
    # 0.5 is exact in bfloat16, so any difference is the coat's: x ~ 1000 in bfloat16 would be off by up to 4
    x, sigma = 1000 + torch.randn(2, 4, 2, 2), torch.tensor(1000.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        x0_hat = Denoiser(Spy(0.5, torch.bfloat16), Eps())(x, sigma, conditioning(2))
    assert x0_hat.dtype == torch.float32
    assert torch.equal(x0_hat, x - 500)


def test_gradients_and_checkpoints_see_only_the_backbone():
    denoiser = Denoiser(nn.Identity(), Eps())
    assert not denoiser.state_dict()
    weight = nn.Parameter(torch.tensor(2.0))
    denoiser = Denoiser(Spy(), X0())
    denoiser.backbone.forward = lambda x, c_noise, cond: weight * x
    denoiser(torch.ones(1, 4, 2, 2), torch.tensor(1.0), conditioning(1)).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor(16 / 2**0.5))
