"""Metrics over generated pictures, their captions and the reference pictures, accumulated in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldm.data import shapes, shapes_oracle
from ldm.errors import UserError


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features (Heusel et al. 2017), in float64.

    features_a: (N, D), features_b: (M, D). The trace of the covariances' square root is the nuclear norm of the product of
    the centered features: no square root of a matrix is taken, so rank-deficient covariances (N < D) are exact too.

    Raises:
        UserError: fewer than two rows, or different widths.
    """
    if min(len(features_a), len(features_b)) < 2 or features_a.shape[1] != features_b.shape[1]:
        raise UserError(
            f"frechet_distance: features are {tuple(features_a.shape)} and {tuple(features_b.shape)}; give at least two "
            "rows each, of the same width"
        )
    a, b = features_a.double(), features_b.double()
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    a, b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    # any A' with A'^T A' = A^T A serves: the triangular factor has at most D rows
    a, b = torch.linalg.qr(a, mode="r").R, torch.linalg.qr(b, mode="r").R
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


class FrechetDistance(Metric):
    """Fréchet distance between generated and reference pictures on the features of a given network.

    Args:
        features: images (B, 3, H, W) uint8 -> (B, D), with a `name`.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.add_state("generated", default=[], dist_reduce_fx="cat")
        self.add_state("real", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, captions: Sequence[str], reference: Tensor) -> None:
        """images, reference: (B, 3, H, W) uint8."""
        self.generated.append(self.features(images))
        self.real.append(self.features(reference))

    def compute(self) -> dict[str, float]:
        pair = (torch.cat(state) if isinstance(state, list) else state for state in (self.generated, self.real))
        return {f"frechet/{self.features.name}": frechet_distance(*pair)}


class CaptionAccuracy(Metric):
    """Whether pictures of captioned shapes show what their captions state, read from the pixels by `ldm.data.shapes_oracle`.

    `caption_accuracy/<attribute>` and `/all` (every stated attribute at once) over captions of one shape;
    `caption_accuracy/unseen/...` over shape and color pairs that training never showed; `caption_accuracy/two/...` over
    captions of two shapes and their relation.
    """

    GROUPS = ("single", "unseen", "two")
    ATTRIBUTES = ("all", "shape", "color", "size", "position", "background", "relation")

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.GROUPS), len(self.ATTRIBUTES), 2, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")  # [..., (right, judged)]

    def update(self, images: Tensor, captions: Sequence[str], reference: Tensor) -> None:
        """images: (B, 3, H, W) uint8; captions: B, of captioned shapes (UserError otherwise)."""
        for image, caption in zip(images.cpu(), captions, strict=True):
            group = self.GROUPS.index(shapes.kind(caption))
            for attribute, right in shapes_oracle.score(image, caption).items():
                column = self.ATTRIBUTES.index(attribute)
                self.counts[group, column] += torch.tensor([int(right), 1], device=self.counts.device)

    def compute(self) -> dict[str, float]:
        values = {}
        for group, rows in zip(self.GROUPS, self.counts.tolist(), strict=True):
            prefix = "caption_accuracy/" if group == "single" else f"caption_accuracy/{group}/"
            for attribute, (right, judged) in zip(self.ATTRIBUTES, rows, strict=True):
                if judged:
                    values[prefix + attribute] = right / judged
        return values
