import pytest
import torch

from ldm.diffusion.parameterization import EDM, X0, Eps, Flow, Parameterization, V
from ldm.diffusion.weighting import P2, Classical, MinSNR, SoftMinSNR, debiased, snr, uniform
from ldm.errors import UserError

SIGMA = torch.logspace(-2, 2, 64, dtype=torch.float64)


@pytest.fixture
def prediction() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x0, ε, estimate of x0), each (64, 100) float64, one σ a row."""
    return tuple(torch.randn(3, 64, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).square().mean(dim=1)


def test_min_snr_is_the_published_loss_for_eps_and_v(prediction):
    """min(snr, γ)/snr on the ε-loss, min(snr, γ)/(snr + 1) on the v-loss (diffusers, train_text_to_image.py)."""
    x0, eps, x0_hat = prediction
    sigma, ratio = SIGMA[:, None], 1 / SIGMA**2
    eps_hat = (x0 + sigma * eps - x0_hat) / sigma
    alpha = 1 / (1 + sigma**2).sqrt()
    v, v_hat = alpha * eps - sigma * alpha * x0, alpha * eps_hat - sigma * alpha * x0_hat
    ours = MinSNR(5.0)(SIGMA) * mse(x0_hat, x0)
    torch.testing.assert_close(ours, ratio.clamp(max=5) / ratio * mse(eps_hat, eps))
    torch.testing.assert_close(ours, ratio.clamp(max=5) / (ratio + 1) * mse(v_hat, v))


@pytest.mark.parametrize("parameterization", [Eps(), V(), X0(), Flow(), EDM()], ids=lambda each: type(each).__name__)
def test_classical_is_the_error_of_the_network(parameterization: Parameterization, prediction):
    x0, eps, x0_hat = prediction
    c_skip, c_out, *_ = (c[:, None] for c in parameterization.coefficients(SIGMA))
    x = x0 + SIGMA[:, None] * eps
    f, f_hat = (x0 - c_skip * x) / c_out, (x0_hat - c_skip * x) / c_out
    torch.testing.assert_close(Classical(parameterization)(SIGMA) * mse(x0_hat, x0), mse(f_hat, f))


def test_named_weights():
    assert torch.equal(uniform(SIGMA), torch.ones_like(SIGMA))
    torch.testing.assert_close(snr(SIGMA), Classical(Eps())(SIGMA))
    assert MinSNR(5.0)(torch.tensor([0.01, 1.0, 10.0])).tolist() == pytest.approx([5, 1, 0.01])
    for weighting in (uniform, snr, debiased, MinSNR(), SoftMinSNR(), P2(), Classical(EDM())):
        assert weighting(SIGMA.float()).dtype == torch.float32


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_bad_gamma(gamma: float):
    with pytest.raises(UserError, match=r"gamma is .* a number > 0"):
        MinSNR(gamma)


def test_p2_is_the_published_loss_for_eps(prediction):
    """λ' = λ/(k + SNR)^γ, where λ makes the plain ε-loss (Choi et al. 2022, equation 9)."""
    x0, eps, x0_hat = prediction
    sigma = SIGMA[:, None]
    eps_hat = (x0 + sigma * eps - x0_hat) / sigma
    torch.testing.assert_close(P2(0.5, 1.0)(SIGMA) * mse(x0_hat, x0), mse(eps_hat, eps) / (1 + SIGMA**-2) ** 0.5)


def test_debiased_is_the_published_loss_for_eps(prediction):
    """The ε-loss over √SNR (Yu et al. 2023, equation 10)."""
    x0, eps, x0_hat = prediction
    sigma = SIGMA[:, None]
    eps_hat = (x0 + sigma * eps - x0_hat) / sigma
    torch.testing.assert_close(debiased(SIGMA) * mse(x0_hat, x0), mse(eps_hat, eps) * SIGMA)


def test_soft_min_snr_is_below_min_snr_and_meets_it_at_the_ends():
    soft, hard = SoftMinSNR(5.0)(SIGMA), MinSNR(5.0)(SIGMA)
    assert (soft < hard).all()
    torch.testing.assert_close(soft[[0, -1]], hard[[0, -1]], rtol=2e-3, atol=0)
    assert SoftMinSNR(5.0)(torch.tensor([0.2**0.5])).item() == pytest.approx(2.5)


@pytest.mark.parametrize("make", [lambda: P2(-1.0), lambda: P2(k=0.0)])
def test_bad_p2(make):
    with pytest.raises(UserError, match="gamma >= 0 and k > 0"):
        make()


def test_bad_soft_gamma():
    with pytest.raises(UserError, match="SoftMinSNR: gamma is 0"):
        SoftMinSNR(0.0)
