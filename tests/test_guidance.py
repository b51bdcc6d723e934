import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import (
    APG,
    Autoguidance,
    DynamicThreshold,
    GradientGuidance,
    Guidance,
    InstructPix2Pix,
    Interval,
    Rescale,
)  # fmt: skip
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


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(9))
SIGMA = torch.tensor(1.7, dtype=torch.float64)
COND, NULL = make(3, 0), make(1, 1)
NULL_3 = Conditioning(*(None if part is None else part.repeat(3, *[1] * (part.dim() - 1)) for part in NULL))


def guided(guidance: Guidance, network: nn.Module | None = None, x: Tensor = X, sigma: Tensor = SIGMA) -> Tensor:
    return guidance(Denoiser(network or Network(), V()), COND, NULL)(x, sigma)


def both(sigma: Tensor = SIGMA) -> tuple[Tensor, Tensor]:
    """D_cond, D_null."""
    return tuple(Denoiser(Network(), V())(X, sigma, cond) for cond in (COND, NULL_3))


@pytest.mark.parametrize("parameterization", [Eps(), V(), Flow(), X0()], ids=lambda each: type(each).__name__)
def test_guidance_on_d_is_guidance_on_the_prediction(parameterization):
    """F_null + scale·(F_cond − F_null), and D of that: what the literature does with ε."""
    network = Network()
    guided = Guidance(4.0)(Denoiser(network, parameterization), COND, NULL)(X, SIGMA)
    c_skip, c_out, c_in, c_noise = parameterization.coefficients(SIGMA.float().expand(3))
    c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in (c_skip, c_out, c_in))
    f_cond, f_null = network(c_in * X, c_noise, COND), network(c_in * X, c_noise, NULL_3)
    expected = c_skip * X + c_out * (f_null + 4 * (f_cond - f_null))
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "only"), [(1, COND), (1.0, COND), (0.0, NULL_3)])
def test_scale_one_and_zero_are_one_plain_call(scale: float, only: Conditioning):
    network = Network()
    denoiser = Denoiser(network, V())
    out = Guidance(scale)(denoiser, COND, NULL)(X, SIGMA)
    assert network.rows == [3]
    torch.testing.assert_close(out, denoiser(X, SIGMA, only), rtol=0, atol=1e-6)
    nearby = Guidance(scale + 1e-7)(denoiser, COND, NULL)(X, SIGMA)
    torch.testing.assert_close(nearby, out, rtol=0, atol=5e-6)


@pytest.mark.parametrize("null", [NULL, NULL_3])
def test_other_scales_are_one_batched_call(null: Conditioning):
    network = Network()
    denoiser = Denoiser(network, V())
    out = Guidance(2.5)(denoiser, COND, null)(X, SIGMA)
    assert network.rows == [6]
    d_cond, d_null = denoiser(X, SIGMA, COND), denoiser(X, SIGMA, NULL_3)
    torch.testing.assert_close(out, 2.5 * d_cond - 1.5 * d_null, rtol=1e-5, atol=1e-5)


def test_spatial_conditioning_is_guided_too():
    cond, null = COND._replace(spatial=torch.ones(3, 1, 4, 4)), NULL._replace(spatial=torch.zeros(1, 1, 4, 4))
    denoiser = Denoiser(nn.Module(), X0())
    denoiser.backbone.forward = lambda x, c_noise, cond: x[:, 2:].expand(-1, 2, -1, -1)
    torch.testing.assert_close(Guidance(3.0)(denoiser, cond, null)(X, SIGMA), torch.full_like(X, 3.0))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_bad_scale(scale: float):
    with pytest.raises(UserError, match=r"guidance scale is .* >= 0"):
        Guidance(scale)


def test_without_rules_scale_one_is_unguided():
    torch.testing.assert_close(guided(Guidance()), both()[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sigma", "rows"), [(0.5, [3]), (0.51, [6]), (2.0, [6]), (2.01, [3])])
def test_an_interval_guides_inside_it_and_costs_one_row_outside(sigma: float, rows: list[int]):
    network, sigma = Network(), torch.tensor(sigma, dtype=torch.float64)
    out = guided(Guidance(3.0, interval=Interval(0.5, 2.0)), network, sigma=sigma)
    d_cond, d_null = both(sigma)
    assert network.rows == rows
    torch.testing.assert_close(out, d_null + 3 * (d_cond - d_null) if rows == [6] else d_cond)


def test_rescale_is_equations_15_and_16():
    network = Network()
    out = guided(Guidance(6.0, rescale=Rescale(0.7)), network)
    d_cond, d_null = both()
    cfg = d_null + 6 * (d_cond - d_null)
    for row in range(3):
        rescaled = cfg[row] * d_cond[row].std() / cfg[row].std()
        torch.testing.assert_close(out[row], 0.7 * rescaled + 0.3 * cfg[row], rtol=1e-5, atol=1e-6)
    assert network.rows == [6]  # the conditional prediction is not computed twice


def test_rescale_is_that_of_diffusers():
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    d_cond, d_null = both()
    theirs = pipeline.rescale_noise_cfg(d_null + 6 * (d_cond - d_null), d_cond, guidance_rescale=0.4)
    torch.testing.assert_close(guided(Guidance(6.0, rescale=Rescale(0.4))), theirs, rtol=1e-5, atol=1e-6)


def test_dynamic_threshold_is_imagens():
    """s = percentile of |x0| over the sample, at least 1; clip to [-s, s] and divide by s (figure A.10)."""
    out = guided(Guidance(8.0, threshold=DynamicThreshold(0.9)))
    d_cond, d_null = both()
    cfg = (d_null + 8 * (d_cond - d_null)).numpy()
    s = np.maximum(np.percentile(np.abs(cfg.reshape(3, -1)), 90, axis=1), 1.0).reshape(3, 1, 1, 1)
    assert s.max() > 1
    np.testing.assert_allclose(out.numpy(), np.clip(cfg, -s, s) / s, rtol=1e-5, atol=1e-6)


def test_dynamic_threshold_leaves_what_is_within_the_limit():
    torch.testing.assert_close(guided(Guidance(2.0, t=DynamicThreshold(1.0, limit=100.0))), guided(Guidance(2.0)))


def test_autoguidance_goes_away_from_the_weaker_denoiser():
    weak = Denoiser(Network(), X0())
    d_cond, _ = both()
    d_weak = weak(X, SIGMA, COND)
    torch.testing.assert_close(guided(Guidance(auto=Autoguidance(weak, 1.8))), d_weak + 1.8 * (d_cond - d_weak))
    torch.testing.assert_close(guided(Guidance(2.0, auto=Autoguidance(weak, 1.0))), guided(Guidance(2.0)))


def test_autoguidance_does_not_take_the_other_networks_keys_and_values():
    seen = []

    class Weak(Network):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
            seen.append(cond.keys_values)
            return super().forward(x, c_noise, cond)

    cond, null = (c._replace(keys_values=torch.ones(len(c.tokens), 3, 8)) for c in (COND, NULL))
    Guidance(2.0, auto=Autoguidance(Denoiser(Weak(), V()), 1.8))(Denoiser(Network(), V()), cond, null)(X, SIGMA)
    assert seen == [None]


class SpatialNetwork(Network):
    def forward(self, x: Tensor, c_noise: Tensor, cond: Conditioning) -> Tensor:
        return super().forward(x[:, :2], c_noise, cond) + x[:, 2:]


def test_instruct_pix2pix_is_equation_3():
    picture = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    cond, null = COND._replace(spatial=picture), NULL_3._replace(spatial=torch.zeros(3, 1, 4, 4))
    network = SpatialNetwork()
    denoiser = Denoiser(network, V())
    out = Guidance(pix=InstructPix2Pix(1.5, 7.5))(denoiser, cond, null)(X, SIGMA)
    assert network.rows == [9]
    nothing, image, full = (denoiser(X, SIGMA, c) for c in (null, null._replace(spatial=picture), cond))
    torch.testing.assert_close(out, nothing + 1.5 * (image - nothing) + 7.5 * (full - image), rtol=1e-5, atol=1e-5)


def test_apg_drops_the_part_along_the_conditional_prediction():
    d_cond, d_null = both()
    out = guided(Guidance(apg=APG(5.0, eta=0.0)))
    for row in range(3):
        unit, diff = d_cond[row] / d_cond[row].norm(), d_cond[row] - d_null[row]
        expected = d_cond[row] + 4 * (diff - (diff * unit).sum() * unit)
        torch.testing.assert_close(out[row], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided(Guidance(apg=APG(5.0, eta=1.0))), guided(Guidance(5.0)), rtol=1e-5, atol=1e-5)


def test_apg_limits_the_norm_and_remembers_within_one_sample():
    d_cond, d_null = both()
    diff = d_cond - d_null
    short = guided(Guidance(apg=APG(2.0, eta=1.0, norm=0.1)))
    torch.testing.assert_close((short - d_cond).flatten(1).norm(dim=1), torch.full((3,), 0.1))
    guidance = Guidance(apg=APG(2.0, eta=1.0, momentum=-0.5))
    for _ in range(2):  # a second sample begins without memory
        denoise = guidance(Denoiser(Network(), V()), COND, NULL)
        torch.testing.assert_close(denoise(X, SIGMA), d_cond + diff, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(denoise(X, SIGMA), d_cond + diff - 0.5 * diff, rtol=1e-5, atol=1e-5)


def test_gradient_guidance_samples_the_posterior_of_a_gaussian():
    """Data N(0, 1), log p(y|x0) = −(x0 − y)²/(2·τ²) through the exact denoiser: D moves by σ²·∇x log p."""
    y, tau = 2.0, 0.5

    class Gaussian(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            return x / (1 + sigma.float() ** 2)

    log_prob = lambda x0_hat, sigma: -((x0_hat - y) ** 2).sum(dim=(1, 2, 3)) / (2 * tau**2)  # noqa: E731
    with torch.no_grad():
        out = Guidance(clip=GradientGuidance(log_prob, 3.0))(Gaussian(), COND, NULL)(X, SIGMA)
    s2 = SIGMA.float() ** 2
    d = X / (1 + s2)
    torch.testing.assert_close(out, d + 3 * s2 * -(d - y) / tau**2 / (1 + s2))
    assert not out.requires_grad


def test_rules_compose_in_their_order():
    d_cond, d_null = both()
    cfg = d_null + 6 * (d_cond - d_null)
    out = guided(Guidance(6.0, interval=Interval(0.1, 5.0), rescale=Rescale(1.0), threshold=DynamicThreshold(1.0, 0.5)))
    rescaled = cfg * (d_cond.std(dim=(1, 2, 3), keepdim=True) / cfg.std(dim=(1, 2, 3), keepdim=True))
    s = rescaled.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.5)
    torch.testing.assert_close(out, rescaled * 0.5 / s, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(2.0, 1.0), "0 <= sigma_min < sigma_max"),
        (lambda: Interval(-1.0, 1.0), "0 <= sigma_min < sigma_max"),
        (lambda: Rescale(1.5), r"number in \[0, 1\]"),
        (lambda: DynamicThreshold(0.0), r"percentile in \(0, 1\]"),
        (lambda: DynamicThreshold(limit=0.0), "limit > 0"),
        (lambda: Autoguidance(None, -1.0), "autoguidance scale is -1.0"),
        (lambda: InstructPix2Pix(-1.0), "give scales >= 0"),
        (lambda: APG(-1.0), "scale >= 0"),
        (lambda: APG(2.0, momentum=1.0), r"momentum in \(-1, 1\)"),
        (lambda: GradientGuidance(None, -1.0), "gradient guidance scale is -1.0"),
    ],
)
def test_bad_rules(make, message: str):
    with pytest.raises(UserError, match=message):
        make()
