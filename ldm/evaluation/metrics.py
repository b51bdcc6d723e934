"""Metrics over generated pictures, their captions and the reference pictures, accumulated in one pass."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.data import shapes, shapes_oracle
from ldm.errors import UserError
from ldm.evaluation.features import FeatureNetwork
from ldm.evaluation.measures import Features, Measure, cosines, frechet, share_of
from ldm.evaluation.measures import frechet_distance as frechet_distance  # public from here


class FeatureMetrics(Metric):
    """Measures that look at pictures through the same network, which sees every picture once.

    Args:
        features: images (B, 3, H, W) uint8 -> (B, D), with a `name`; a `text(captions)` -> (B, D) and a
            `logits(features)` -> (B, K) where measures ask for them.
        measures: each value's name is followed by the network's: frechet/inception.

    `known` holds the real pictures' features once they are computed, also over `reset`: rounds of one evaluation share
    them, and so do those who set it from a file. `samples` has each picture's cosine with its caption, where the network
    reads them.
    """

    def __init__(self, features: FeatureNetwork, measures: Sequence[Measure]) -> None:
        super().__init__()
        self.features, self.measures = features, tuple(measures)
        self.known: Tensor | None = None
        self.samples: dict[str, Tensor] = {}
        for name in ("generated", "real", "read"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, captions: Sequence[str], reference: Tensor | None) -> None:
        """images, reference: (B, 3, H, W) uint8; without a reference only measures that need none."""
        self.generated.append(self.features(images))
        if hasattr(self.features, "text"):
            self.read.append(self.features.text(captions))
        if self.known is None and reference is not None:
            self.real.append(self.features(reference))

    def compute(self) -> dict[str, float]:
        """Raises UserError when generated and real pictures are not as many."""
        generated, real = dim_zero_cat(self.generated), dim_zero_cat(self.real) if len(self.real) else None
        if self.known is None and real is not None and len(real):
            self.known = real
        if distributed.is_initialized() and distributed.get_rank() > 0:
            return {}  # all is gathered; the first rank does the rest
        self._check(generated)
        logits = self.features.logits(generated) if hasattr(self.features, "logits") else None
        read = dim_zero_cat(self.read) if hasattr(self.features, "text") else None
        self.samples = {} if read is None else {f"clip_cosine/{self.features.name}": cosines(generated, read)}
        seen = Features(generated, self.known, read, logits)
        named: dict[str, Any] = {}
        for measure in self.measures:
            for key, value in measure(seen).items():
                name, _, kind = key.partition("/")
                named["/".join(part for part in (name, self.features.name, kind) if part)] = value
        n, width = generated.shape
        if n < width and f"frechet/{self.features.name}" in named:
            warnings.warn(
                f"{n} pictures are fewer than the {width} features of {self.features.name}: a Fréchet distance is far too "
                f"large then; compare it only with others of n={n}",
                stacklevel=2,
            )
        return named

    def _check(self, generated: Tensor) -> None:
        n = len(generated)
        if self.known is not None and len(self.known) != n:
            raise UserError(
                f"{n} generated and {len(self.known)} reference pictures: scores of another n do not compare; give both alike"
            )
        if n > 1 and (generated == generated[0]).all():
            warnings.warn(f"all {n} generated pictures look the same to {self.features.name}", stacklevel=2)


class FrechetDistance(FeatureMetrics):
    """Fréchet distance between generated and reference pictures on the features of a given network."""

    def __init__(self, features: FeatureNetwork) -> None:
        super().__init__(features, [frechet])


class CaptionAccuracy(Metric):
    """Whether pictures of captioned shapes show what their captions state, read from the pixels by `ldm.data.shapes_oracle`.

    `caption_accuracy/<attribute>` and `/all` (every stated attribute at once) over captions of one shape;
    `caption_accuracy/unseen/...` over shape and color pairs that training never showed; `caption_accuracy/two/...` over
    captions of two shapes and their relation. Each with half a 95 % interval, `.../ci95`. `samples` has for each picture the
    share of its caption's statements that it shows.
    """

    GROUPS = ("single", "unseen", "two")
    ATTRIBUTES = ("all", "shape", "color", "size", "position", "background", "relation")

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.GROUPS), len(self.ATTRIBUTES), 2, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")  # [..., (right, judged)]
        self.add_state("shown", default=[], dist_reduce_fx="cat")
        self.samples: dict[str, Tensor] = {}

    def update(self, images: Tensor, captions: Sequence[str], reference: Tensor | None) -> None:
        """images: (B, 3, H, W) uint8; captions: B, of captioned shapes (UserError otherwise)."""
        shown = []
        for image, caption in zip(images.cpu(), captions, strict=True):
            group = self.GROUPS.index(shapes.kind(caption))
            judged = shapes_oracle.score(image, caption)
            for attribute, right in judged.items():
                column = self.ATTRIBUTES.index(attribute)
                self.counts[group, column] += torch.tensor([int(right), 1], device=self.counts.device)
            stated = [right for attribute, right in judged.items() if attribute != "all"]
            shown.append(sum(stated) / len(stated))
        self.shown.append(torch.tensor(shown, dtype=torch.float64))

    def compute(self) -> dict[str, float]:
        self.samples = {"caption_accuracy": dim_zero_cat(self.shown)}
        values: dict[str, float] = {}
        for group, rows in zip(self.GROUPS, self.counts.tolist(), strict=True):
            prefix = "caption_accuracy/" if group == "single" else f"caption_accuracy/{group}/"
            for attribute, (right, judged) in zip(self.ATTRIBUTES, rows, strict=True):
                if judged:
                    values |= share_of(prefix + attribute, right, judged)
        return values
