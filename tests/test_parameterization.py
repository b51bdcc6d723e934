import pytest
import torch
from torch import Tensor

from ldm.diffusion.parameterization import EDM, X0, Eps, Flow, Parameterization, V
from ldm.diffusion.schedules import ScaledLinear
from ldm.errors import UserError

ALL = [Eps(), V(), X0(), Flow(), EDM(), EDM(1.0)]
SIGMA = torch.logspace(-4, 4, 81, dtype=torch.float64)


def house_table(parameterization: Parameterization, s: Tensor) -> tuple[Tensor, ...]:
    """design/HOUSE.md, column by column: c_skip, c_out, c_in, c_noise, loss weight."""
    one, root, label = torch.ones_like(s), (1 + s**2).sqrt(), s.log() / 4
    match parameterization:
        case Eps():
            return one, -s, 1 / root, label, 1 / s**2
        case V():
            return 1 / root**2, -s / root, 1 / root, label, 1 + 1 / s**2
        case X0():
            return 0 * s, one, 1 / root, label, one
        case Flow():
            return 1 / (1 + s), -s / (1 + s), 1 / (1 + s), s / (1 + s), (1 + s) ** 2 / s**2
        case EDM(sigma_data=sd):
            root = (s**2 + sd**2).sqrt()
            return sd**2 / root**2, s * sd / root, 1 / root, label, (root / (s * sd)) ** 2
    raise AssertionError(parameterization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parameterization", ALL, ids=lambda each: type(each).__name__)
def test_coefficients_follow_the_table(parameterization: Parameterization, dtype: torch.dtype):
    *expected, expected_weight = house_table(parameterization, SIGMA)
    sigma = SIGMA.to(dtype)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for actual, wanted in zip(parameterization.coefficients(sigma), expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), wanted, **tolerance)
    weight = parameterization.loss_weight(sigma).double()
    torch.testing.assert_close(weight, expected_weight, rtol=tolerance["rtol"], atol=0)


def test_one_prediction_gives_the_same_x0_in_every_parameterization():
    """ε -> v, x0 and flow by the textbook formulas at the VP point (α, s) = (1, σ)/√(1+σ²), not by the coefficients."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.logspace(-2, 2, 41)
    x0, eps = torch.randn(2, 41, 50, generator=generator)
    x = x0 + sigma[:, None] * eps
    alpha = 1 / (1 + sigma**2).sqrt()[:, None]
    v = alpha * eps - sigma[:, None] * alpha * x0
    # EDM with sigma_data = 1 is v-prediction with the other sign
    predictions = {Eps(): eps, V(): v, X0(): x0, Flow(): eps - x0, EDM(1.0): -v}
    for parameterization, prediction in predictions.items():
        c_skip, c_out, *_ = parameterization.coefficients(sigma)
        x0_hat = c_skip[:, None] * x + c_out[:, None] * prediction
        torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-4)


def test_edm_has_unit_variance_input_and_target():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 200_000, generator=generator)
    sigma = torch.tensor([0.05, 0.5, 20.0])
    x = 0.5 * x0 + sigma[:, None] * eps
    c_skip, c_out, c_in, _ = (c[:, None] for c in EDM(0.5).coefficients(sigma))
    for unit in (c_in * x, (0.5 * x0 - c_skip * x) / c_out):
        torch.testing.assert_close(unit.std(dim=1), torch.ones(3), rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", [Eps, V, X0])
def test_the_noise_label_can_be_the_vp_index(kind: type):
    schedule = ScaledLinear()
    label = kind(noise_label=schedule.index).coefficients(schedule(torch.tensor([0.0, 500 / 999, 1.0]))).c_noise
    torch.testing.assert_close(label, torch.tensor([0.0, 500.0, 999.0]).double())


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_sigma_data(sigma_data: float):
    with pytest.raises(UserError, match=r"sigma_data is .* a number > 0"):
        EDM(sigma_data)
