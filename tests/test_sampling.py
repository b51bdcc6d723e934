import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.parameterization import EDM, X0, Eps, Flow, Parameterization, V
from ldm.diffusion.sampling import Sampling
from ldm.diffusion.schedules import Karras, RectifiedFlow, ScaledLinear, Schedule
from ldm.diffusion.solvers import Solver, dpmpp_2m, euler, heun
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom

PARAMETERIZATIONS = [Eps(), V(), X0(), Flow(), EDM()]
SOLVERS = [euler, heun, dpmpp_2m]
TARGET = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = KeyedRandom(0, torch.arange(3)).normal("sample", (4, 8, 8))


def conditioning(rows: int, value: float) -> Conditioning:
    return Conditioning(torch.full((rows, 2, 3), value), torch.ones(rows, 2, dtype=torch.bool), torch.zeros(rows, 0))


COND, NULL = conditioning(3, 1.0), conditioning(1, 0.0)


class Perfect(nn.Module):
    """The F that makes D exact for TARGET: it reads σ back from its noise label."""

    def __init__(self, parameterization: Parameterization) -> None:
        super().__init__()
        self.parameterization = parameterization

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        label = c_noise.double()
        sigma = label / (1 - label) if isinstance(self.parameterization, Flow) else (4 * label).exp()
        c_skip, c_out, c_in, _ = (c.view(-1, 1, 1, 1) for c in self.parameterization.coefficients(sigma))
        return ((TARGET - c_skip * x / c_in) / c_out).float()


@pytest.mark.parametrize("schedule", [ScaledLinear(), RectifiedFlow()], ids=["scaled linear", "flow"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=str)
def test_a_perfect_network_samples_its_target(
    parameterization: Parameterization, solver: Solver, scale: float, schedule: Schedule
):
    sampling = Sampling(solver, schedule, ClassifierFree(scale), steps=12)
    z = sampling(Denoiser(Perfect(parameterization), parameterization), COND, NULL, NOISE)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, TARGET.expand(3, -1, -1, -1), rtol=0, atol=1e-4)


class Network(nn.Module):
    """Small, nonlinear, conditional, and not perfect."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        generator = torch.Generator().manual_seed(2)
        self.conv.weight.data = 0.2 * torch.randn(self.conv.weight.shape, generator=generator)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        shift = (c_noise + cond.tokens.mean(dim=(1, 2))).view(-1, 1, 1, 1)
        return torch.tanh(self.conv(x) + shift)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=str)
def test_a_sample_does_not_know_its_neighbors(parameterization: Parameterization, solver: Solver, scale: float):
    sampling = Sampling(solver, ScaledLinear(), ClassifierFree(scale), steps=8)
    denoiser = Denoiser(Network(), parameterization)
    together = sampling(denoiser, COND, NULL, NOISE)
    assert together.isfinite().all()
    alone = sampling(denoiser, conditioning(1, 1.0), NULL, NOISE[1:2])
    torch.testing.assert_close(alone, together[1:2], rtol=1e-6, atol=1e-5)


def test_starts_at_sigma_max_without_gradients():
    seen = []

    def solver(denoise, x: Tensor, sigmas: Tensor) -> Tensor:
        seen.extend([x, sigmas])
        return denoise(x, sigmas[:1].expand(len(x)))

    z = Sampling(solver, Karras(), ClassifierFree(1.0), 4)(Denoiser(Network(), EDM()), COND, NULL, NOISE)
    torch.testing.assert_close(seen[0], 80 * NOISE)
    assert seen[1].shape == (5,)
    assert not z.requires_grad


def test_bad_steps_fail_when_built():
    with pytest.raises(UserError, match="steps is 0"):
        Sampling(euler, Karras(), ClassifierFree(1.0), steps=0)
