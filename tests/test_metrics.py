import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.data import shapes
from ldm.errors import UserError
from ldm.evaluation.features import FeatureNetwork, PooledPixels, area
from ldm.evaluation.measures import clip_score, frechet, inception_score, kernel_distance
from ldm.evaluation.metrics import CaptionAccuracy, FeatureMetrics, FrechetDistance, frechet_distance


def pictures(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 4]])
def test_the_frechet_metric_does_not_depend_on_batches(sizes: list[int]):
    a, b, network = pictures(6, 0), pictures(6, 1), PooledPixels(2)
    metric = FrechetDistance(network)
    for part, reference in zip(a.split(sizes), b.split(sizes), strict=True):
        metric.update(part, [""] * len(part), reference)
    assert metric.compute() == {"frechet/pixels2": pytest.approx(frechet_distance(network(a), network(b)), rel=1e-9)}


class Reader(FeatureNetwork):
    """Sees mean colors, reads lengths, and counts what it was shown."""

    def __init__(self) -> None:
        super().__init__("reader", 1, area)
        self.seen = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return pixels.flatten(1) / 255 + 0.1

    def text(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([[float(len(caption)), 1.0, 2.0] for caption in captions])

    def logits(self, features: Tensor) -> Tensor:
        return features * 9


def fed(metric: FeatureMetrics, n: int = 24, sizes: int = 5) -> dict[str, float]:
    a, b, captions = pictures(n, 0), pictures(n, 1), ["x" * (1 + i % 4) for i in range(n)]
    for i in range(0, n, sizes):
        metric.update(a[i : i + sizes], captions[i : i + sizes], b[i : i + sizes])
    return metric.compute()


def test_measures_share_features_that_are_computed_once_a_picture():
    metric = FeatureMetrics(Reader(), [frechet, kernel_distance, inception_score, clip_score])
    first = fed(metric)
    assert {name.partition("/")[0] for name in first} == {
        "frechet", "kid", "inception_score", "clip_cosine", "clip_cosine_x100",
    }  # fmt: skip
    assert "clip_cosine/reader/ci95" in first
    assert metric.samples["clip_cosine/reader"].mean() == pytest.approx(first["clip_cosine/reader"])
    assert len(metric.samples["clip_cosine/reader"]) == 24
    assert metric.features.seen == 48
    metric.reset()
    assert fed(metric, sizes=7) == pytest.approx(first, rel=1e-9)
    assert metric.features.seen == 48 + 24  # a second round does not look at the real pictures again


def test_generated_and_real_pictures_must_be_as_many():
    metric = FeatureMetrics(Reader(), [frechet])
    metric.known = torch.zeros(23, 3)
    with pytest.raises(UserError, match="24 generated and 23 reference pictures: scores of another n do not compare"):
        fed(metric)


def test_what_makes_a_distance_worthless_is_warned_of():
    metric = FrechetDistance(PooledPixels(4))
    with pytest.warns(UserWarning, match="24 pictures are fewer than the 48 features of pixels4"):
        fed(metric)
    metric = FrechetDistance(PooledPixels(1))
    same = pictures(1, 0).expand(9, -1, -1, -1)
    metric.update(same, [""] * 9, pictures(9, 1))
    with pytest.warns(UserWarning, match="all 9 generated pictures look the same to pixels1"):
        metric.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fed(FrechetDistance(PooledPixels(1)))


def test_floats_are_no_pictures():
    with pytest.raises(UserError, match=r"uint8 pictures in 0\.\.255, these are torch.float32 in .*to_uint8"):
        FrechetDistance(PooledPixels(1)).update(pictures(3, 0) / 255, [""] * 3, pictures(3, 1))


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
    plain = {name: value for name, value in values.items() if not name.endswith("/ci95")}
    assert plain == pytest.approx({f"caption_accuracy/{name}": value for name, value in expected.items()})
    metric = CaptionAccuracy()
    for caption in captions:
        metric.update(image[None], [caption], None)
    metric.compute()
    assert metric.samples["caption_accuracy"].tolist() == pytest.approx([1, 4 / 5, 3 / 5, 1 / 2])
    assert all(0 < values[f"{name}/ci95"] < 0.5 for name in plain)


def test_captions_of_something_else_are_refused():
    with pytest.raises(UserError, match="no caption of shapes"):
        accuracy(pictures(1, 0), ["a photograph of a dog"])
