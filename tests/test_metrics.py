import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from ldm.data import shapes
from ldm.errors import UserError
from ldm.evaluation.features import PooledPixels
from ldm.evaluation.metrics import CaptionAccuracy, FrechetDistance, frechet_distance


def features(n: int, width: int, seed: int) -> Tensor:
    """Correlated, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + seed


def by_definition(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) with scipy's matrix square root."""
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    return float((a.mean(0) - b.mean(0)).square().sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root))


@pytest.mark.parametrize(("n", "m", "width"), [(200, 300, 8), (60, 50, 32), (500, 500, 1)])
def test_frechet_equals_the_definition(n: int, m: int, width: int):
    a, b = features(n, width, 0), features(m, width, 1)
    by_hand = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    expected = by_hand if width == 1 else by_definition(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_fewer_rows_than_features():
    """Rank-deficient covariances: compared with the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which eigh finds exactly."""
    a, b = features(10, 32, 0), features(7, 32, 1)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(1e-9)).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "width"), [(100, 16), (10, 48), (300, 48)])
def test_frechet_of_a_set_with_itself_is_zero(n: int, width: int):
    a = features(n, width, 0) * 0.1
    assert abs(frechet_distance(a, a)) < 1e-6
    assert abs(frechet_distance(a.float(), a.float()[torch.randperm(n)])) < 1e-6


def test_frechet_refuses_what_has_no_covariance():
    with pytest.raises(UserError, match=r"\(1, 4\) and \(9, 4\); give at least two rows each"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(9, 4))
    with pytest.raises(UserError, match="of the same width"):
        frechet_distance(torch.zeros(5, 4), torch.zeros(5, 3))


def pictures(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 4]])
def test_the_frechet_metric_does_not_depend_on_batches(sizes: list[int]):
    a, b, network = pictures(6, 0), pictures(6, 1), PooledPixels(2)
    metric = FrechetDistance(network)
    for part, reference in zip(a.split(sizes), b.split(sizes), strict=True):
        metric.update(part, [""] * len(part), reference)
    assert metric.compute() == {"frechet/pixels2": pytest.approx(frechet_distance(network(a), network(b)))}


def render(n: int, draw) -> tuple[Tensor, list[str]]:
    rngs = [np.random.default_rng([7, i]) for i in range(n)]
    scenes = [draw(i, rng) for i, rng in enumerate(rngs)]
    images = torch.from_numpy(np.stack([shapes.render(scene, 32) for scene in scenes])).permute(0, 3, 1, 2)
    return images, [shapes.caption(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]


def accuracy(images: Tensor, captions: list[str], batch: int = 50) -> dict[str, float]:
    metric = CaptionAccuracy()
    for i in range(0, len(captions), batch):
        metric.update(images[i : i + batch], captions[i : i + batch], images[i : i + batch])
    return metric.compute()


def test_caption_accuracy_of_true_pictures_is_nearly_one_in_every_group():
    images, captions = render(120, shapes.validation_scene)
    values = accuracy(images, captions)
    for group in ("", "unseen/", "two/"):
        assert values[f"caption_accuracy/{group}all"] >= 0.95
        assert values[f"caption_accuracy/{group}shape"] >= 0.95
    assert {"caption_accuracy/two/relation", "caption_accuracy/position"} <= values.keys()
    assert not {"caption_accuracy/relation", "caption_accuracy/two/position"} & values.keys()
    assert accuracy(images, captions, batch=7) == values


def test_caption_accuracy_of_others_pictures_is_near_chance():
    images, captions = render(96, shapes.validation_scene)
    values = accuracy(images.roll(6, dims=0), captions)
    assert values["caption_accuracy/all"] < 0.1
    assert values["caption_accuracy/shape"] < 0.5
    assert values["caption_accuracy/unseen/all"] < 0.3


def test_each_attribute_is_judged_on_its_own():
    scene = shapes.Scene(
        "black", (shapes.Shape("circle", "red", "large", 0.5, 0.5, shapes.RADII[1]["large"]),), "center", None
    )
    image = torch.from_numpy(shapes.render(scene, 32)).permute(2, 0, 1)
    captions = [
        "a large red circle at the center on black",
        "a small red circle at the center on black",
        "a large blue circle at the top on black",
        "red square",
    ]
    values = accuracy(torch.stack([image] * 4), captions)
    expected = {"all": 1 / 4, "shape": 3 / 4, "color": 3 / 4, "size": 2 / 3, "position": 2 / 3, "background": 1}
    assert values == pytest.approx({f"caption_accuracy/{name}": value for name, value in expected.items()})


def test_captions_of_something_else_are_refused():
    with pytest.raises(UserError, match="no caption of shapes"):
        accuracy(pictures(1, 0), ["a photograph of a dog"])
