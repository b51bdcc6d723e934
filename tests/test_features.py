from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_config import composed
from torch import Tensor, nn
from torchvision.models import inception as parts

from ldm import config
from ldm.errors import UserError
from ldm.evaluation.features import (
    Inception,
    PooledPixels,
    PooledStages,
    area,
    bilinear,
    clean,
    pillow_bicubic,
    tensorflow_bilinear,
)
from ldm.models import efficientnet


def pictures(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_are_average_colors_of_the_cells():
    network = PooledPixels(2)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[0, 1, :4, 4:] = 255  # green in the upper right
    features = network(images)
    assert features.shape == (2, 12)
    assert features.dtype == torch.float32
    expected = torch.zeros(3, 2, 2)
    expected[1, 0, 1] = 1
    assert torch.equal(features[0], expected.flatten())
    assert not features[1].any()


def test_it_is_named_by_its_grid():
    assert PooledPixels(4).name == "pixels4"


@pytest.mark.parametrize("side", [9, 40])
def test_resizing_is_that_of_the_libraries(side: int):
    images = pictures(2, 20)
    array = images[1].permute(1, 2, 0).numpy()
    resized = np.asarray(Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC))
    ours = pillow_bicubic(images, side)[1].permute(1, 2, 0).numpy()
    assert np.abs(ours - resized.astype(np.float32)).max() <= 1  # rounding
    channels = [Image.fromarray(array[..., c].astype(np.float32), mode="F") for c in range(3)]
    exact = np.stack([np.asarray(c.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels])
    assert np.abs(clean(images, side)[1].numpy() - exact).max() < 1e-3
    theirs = F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False)
    assert torch.equal(bilinear(images, side), theirs)


@pytest.mark.parametrize("side", [7, 32])
def test_tensorflow_s_bilinear_pixel_by_pixel(side: int):
    """The place of pixel i is i * size / side, without half-pixel centers (TensorFlow 1's ResizeBilinear)."""
    image = pictures(1, 12)
    ours = tensorflow_bilinear(image, side)[0, 0].numpy()
    pixels = image[0, 0].numpy().astype(np.float64)
    for i in range(side):
        for j in range(side):
            y, x = np.float32(i * np.float32(12 / side)), np.float32(j * np.float32(12 / side))
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 11), min(x0 + 1, 11)
            top = pixels[y0, x0] + (pixels[y0, x1] - pixels[y0, x0]) * (x - x0)
            bottom = pixels[y1, x0] + (pixels[y1, x1] - pixels[y1, x0]) * (x - x0)
            assert ours[i, j] == pytest.approx(top + (bottom - top) * (y - y0), abs=1e-3)


def test_an_antialiased_resize_differs_from_the_others():
    """Six points of FID lie between them."""
    small = {resize.__name__: resize(pictures(1, 64), 16) for resize in (clean, bilinear, tensorflow_bilinear, area)}
    assert (small["clean"] - small["area"]).abs().mean() < 0.5 * (small["clean"] - small["bilinear"]).abs().mean()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones in the file's layout, with batch statistics that keep the signal alive."""
    torch.manual_seed(0)
    network = parts.Inception3(1008, aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_equals_torch_fidelity_s(weights: Path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    ours, images = Inception(str(weights)), pictures(2, 40)
    features, logits = theirs(images)
    assert features.std() > 1e-3
    assert (ours(images) - features).abs().max() <= 1e-5 * features.abs().max()
    assert (ours.logits(ours(images)) - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_inception_s_pooling_is_tensorflow_s(weights: Path):
    """Without that, torchvision's: padding counts in an average, and the last block averages too."""
    ours = Inception(str(weights))
    x = torch.randn(1, 192, 9, 9)
    block = ours.network.Mixed_5b
    pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    assert torch.equal(block(x)[:, -32:], block.branch_pool(pooled))
    last, x = ours.network.Mixed_7c, torch.randn(1, 2048, 5, 5)
    assert torch.equal(last(x)[:, -192:], last.branch_pool(F.max_pool2d(x, 3, 1, 1)))


def test_inception_is_named_by_its_resize_and_identified_by_its_weights(weights: Path):
    one, other = Inception(str(weights)), Inception(str(weights), resize=clean)
    assert (one.name, other.name) == ("inception", "inception_clean")
    assert Inception(str(weights), resize=bilinear).name == "inception_pytorch"
    assert one.identity() == {"digest": other.identity()["digest"], "side": 299, "resize": "tensorflow_bilinear"}
    other.network.Conv2d_1a_3x3.conv.weight[0, 0, 0, 0] += 1e-3
    assert one.identity()["digest"] != other.identity()["digest"]


@pytest.mark.parametrize(("more", "name"), [([], "inception"), (["bilinear"], "inception_pytorch")])
def test_the_shipped_metrics_are_built_on_it(weights: Path, more: list[str], name: str):
    words = [f"metrics.inception.features.resize._target_=ldm.evaluation.features.{resize}" for resize in more]
    words += ["metrics=inception", f"metrics.inception.features.weights={weights}"]
    (metric,) = config.build_each(composed("train", "experiment=demo", *words).metrics)
    assert metric.features.name == name
    images = pictures(12, 16)
    metric.update(images, [""] * 12, images.flip(3))
    with pytest.warns(UserWarning, match="12 pictures are fewer than the 2048 features"):
        values = metric.compute()
    assert {f"{part}/{name}" for part in ("frechet", "kid", "inception_score", "precision")} <= values.keys()


def test_missing_and_other_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="ldm fetch inception"):
        Inception()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth holds no weights of FID's Inception v3: .*"):
        Inception(str(tmp_path / "other.pth"))


def test_efficientnet_s_features_are_the_mean_of_its_last_stage():
    network = PooledStages("efficientnet", 64, efficientnet.load())
    images = pictures(3, 32)
    features = network(images)
    assert features.shape == (3, 320)
    x = (pillow_bicubic(images, 64) / 127.5 - 1 - torch.tensor(efficientnet.MEAN).view(1, 3, 1, 1)) / torch.tensor(
        efficientnet.STD
    ).view(1, 3, 1, 1)
    for stage in efficientnet.load():
        x = stage(x)
    assert torch.allclose(features, x.mean(dim=(2, 3)), atol=1e-4)
    assert torch.equal(network(images[1:2])[0], features[1]) or torch.allclose(
        network(images[1:2])[0], features[1], atol=1e-5
    )
    assert not any(p.requires_grad for p in network.parameters())
