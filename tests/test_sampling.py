from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.parameterization import EDM, X0, Eps, Flow, Parameterization, V
from ldm.diffusion.sampling import Sampling
from ldm.diffusion.schedules import Karras, RectifiedFlow, ScaledLinear, Schedule, Trailing
from ldm.diffusion.solvers import (
    Solver,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_sde,
    euler,
    heun,
    lcm,
    lms,
    plms,
    unipc,
)  # fmt: skip
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom

PARAMETERIZATIONS = [Eps(), V(), X0(), Flow(), EDM()]
DDPM, SDE = partial(euler, eta=1.0), partial(dpmpp_2m, eta=1.0)
SOLVERS = [euler, DDPM, heun, dpmpp_2s, dpmpp_2m, SDE, dpmpp_3m, dpmpp_sde, unipc, lms, plms, lcm]
TARGET = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
RANDOM, SHAPE = KeyedRandom(0, torch.arange(3)), (4, 8, 8)


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
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=lambda each: type(each).__name__)
def test_a_perfect_network_samples_its_target(
    parameterization: Parameterization, solver: Solver, scale: float, schedule: Schedule
):
    sampling = Sampling(solver, schedule, Guidance(scale), steps=12)
    z = sampling(Denoiser(Perfect(parameterization), parameterization), COND, NULL, RANDOM, SHAPE)
    assert z.dtype == torch.float32
    # x − σ·F rounds to σ·2⁻²⁴ at σ = 999, and PLMS carries the first slopes on with its coefficients of equal steps
    known = solver is plms and isinstance(parameterization, Eps) and isinstance(schedule, RectifiedFlow)
    torch.testing.assert_close(z, TARGET.expand(3, -1, -1, -1), rtol=0, atol=5e-3 if known else 1e-4)


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
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=lambda each: type(each).__name__)
def test_a_sample_does_not_know_its_neighbors(parameterization: Parameterization, solver: Solver, scale: float):
    sampling = Sampling(solver, ScaledLinear(), Guidance(scale), steps=8)
    denoiser = Denoiser(Network(), parameterization)
    together = sampling(denoiser, COND, NULL, RANDOM, SHAPE)
    assert together.isfinite().all()
    alone = sampling(denoiser, conditioning(1, 1.0), NULL, KeyedRandom(0, torch.tensor([1])), SHAPE)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-5, atol=1e-5)


def test_what_does_not_change_over_steps_is_computed_once():
    counted: list[Conditioning] = []

    class Prepared(Network):
        def prepared(self, cond: Conditioning) -> Conditioning:
            counted.append(cond)
            return cond._replace(keys_values=cond.tokens.mean(dim=(1, 2), keepdim=True))

        def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
            assert cond.keys_values is not None
            torch.testing.assert_close(cond.keys_values[:, 0, 0], cond.tokens.mean(dim=(1, 2)))
            return super().forward(x, c_noise, cond)

    network, plain = Prepared(), Network()
    plain.load_state_dict(network.state_dict())
    sampling = Sampling(euler, Karras(), Guidance(3.0), steps=5)
    expected, z = (sampling(Denoiser(each, V()), COND, NULL, RANDOM, SHAPE) for each in (plain, network))
    assert torch.equal(z, expected)
    assert len(counted) == 2


def test_starts_at_sigma_max_without_gradients():
    seen = []

    def solver(denoise, x: Tensor, sigmas: Tensor, noise, callback) -> Tensor:
        seen.extend([x, sigmas, noise, callback])
        return denoise(x, sigmas[0])

    denoiser = Denoiser(Network(), EDM())
    z = Sampling(solver, Karras(), Guidance(1.0), 4)(denoiser, COND, NULL, RANDOM, SHAPE, callback=print)
    torch.testing.assert_close(seen[0], 80 * RANDOM.normal("sampling", SHAPE))
    assert seen[2](2.0, 1.0).shape == z.shape
    assert seen[3] is print
    assert seen[1].shape == (5,)
    assert not z.requires_grad


def test_bad_steps_fail_when_built():
    with pytest.raises(UserError, match="steps is 0"):
        Sampling(euler, Karras(), Guidance(1.0), steps=0)
    with pytest.raises(UserError, match="1001 steps; give at most 1000"):
        Sampling(euler, Karras(), Guidance(1.0), 1001, Trailing())


@pytest.mark.parametrize("solver", [DDPM, SDE, dpmpp_sde, lcm])
def test_a_stochastic_sample_is_a_function_of_seed_and_index(solver: Solver):
    sampling, denoiser = Sampling(solver, ScaledLinear(), Guidance(1.0), steps=6), Denoiser(Network(), V())
    draw = lambda seed: sampling(denoiser, COND, NULL, KeyedRandom(seed, torch.arange(3)), SHAPE)  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.allclose(draw(0), draw(1))
