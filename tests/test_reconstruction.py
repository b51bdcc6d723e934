import pytest
import torch
from scipy import linalg
from tiny import autoencoder, batch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm.batch import to_unit
from ldm.evaluation.metrics import frechet_distance
from ldm.evaluation.reconstruction import LatentStatistics, PerceptualQuality, ReconstructionQuality


def pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    reference = batch(n, side=32)["image"]
    return (reference.int() + torch.randint(-30, 31, reference.shape)).clamp(0, 255).to(torch.uint8), reference


def test_psnr_and_ssim_equal_torchmetrics_picture_by_picture_in_any_split():
    torch.manual_seed(0)
    images, reference = pair(5)
    metric = ReconstructionQuality()
    metric.update(images[:2], [""] * 2, reference[:2])
    metric.update(images[2:], [""] * 3, reference[2:])
    values = metric.compute()
    for name, peer in (
        ("psnr", PeakSignalNoiseRatio(data_range=255.0)),
        ("ssim", StructuralSimilarityIndexMeasure(data_range=255.0)),
    ):
        each = []
        for a, b in zip(images.float(), reference.float(), strict=True):
            each.append(peer(a[None], b[None]))
            peer.reset()
        assert values[name] == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)


def test_a_picture_without_an_error_leaves_the_mean_finite():
    images, reference = pair(2)
    metric = ReconstructionQuality()
    metric.update(torch.cat([images[:1], reference[1:]]), [""] * 2, reference)
    assert metric.compute()["psnr"] < 100
    assert metric.samples["psnr"][1] == 100


def test_a_perceptual_distance_is_averaged_over_pictures():
    images, reference = pair(4)

    class Far(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean(dim=(1, 2, 3))

    metric = PerceptualQuality(Far(), "lpips")
    metric.update(images, [""] * 4, reference)
    each = (to_unit(images) - to_unit(reference)).abs().mean(dim=(1, 2, 3))
    expected = {"lpips": each.mean().item(), "lpips/ci95": 1.96 * each.std().item() / 2}
    assert metric.compute() == pytest.approx(expected)
    assert metric.samples["lpips"].tolist() == pytest.approx(each.tolist())


def test_latent_statistics_equal_a_direct_computation():
    network, images = autoencoder(), batch(6)["image"]
    metric = LatentStatistics(network.encode)
    metric.update(images[:4], [""] * 4, images[:4])
    metric.update(images[4:], [""] * 2, images[4:])
    values = metric.compute()
    with torch.no_grad():
        posterior = network.encode(to_unit(images))
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
    assert values["latent/kl"] == pytest.approx(float(posterior.kl().double().mean() / mean[0].numel()))
    assert values["latent/active"] == float((mean.var(dim=0, correction=0) > 0.01).double().mean())
    for c in range(2):
        assert values[f"latent/mean/{c}"] == pytest.approx(float(mean[:, c].mean()))
        spread = variance[:, c].mean() + mean[:, c].var(correction=0)
        assert values[f"latent/std/{c}"] == pytest.approx(float(spread.sqrt()))


def test_rfid_equals_a_float64_computation_of_scipy():
    torch.manual_seed(0)
    a, b = torch.randn(200, 16).double() @ torch.randn(16, 16).double(), torch.randn(150, 16).double() + 0.3
    root = linalg.sqrtm(a.T.cov().numpy() @ b.T.cov().numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
