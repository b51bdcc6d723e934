"""Measures on features of generated and real pictures: pure functions, in float64.

Shapes: N captions with a generated and a real picture each, D features, K classes. Every measure returns {name: value};
`<name>/ci95` is half the width of a 95 % confidence interval, `<name>/std` a spread as it is published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError

Z95 = 1.96  # standard errors to either side
_ROWS = 4096  # taken to float64 together: 30,000 x 2048 of them would be half a GiB
_DISTANCES = 512  # rows of a matrix of distances held at once
_SEED = 2020  # torch-fidelity's, whose subsets and splits these are


class Features(NamedTuple):
    """What a network saw; row i of each belongs to caption i."""

    generated: Tensor  # (N, D)
    real: Tensor | None = None  # (N, D)
    text: Tensor | None = None  # (N, D), of the captions, in the same space
    logits: Tensor | None = None  # (N, K), of the generated

    def only(self, keep: Tensor) -> "Features":
        """The rows where keep (N,) bool is True."""
        parts: list[Any] = [None if part is None else part[keep] for part in self]
        return Features(*parts)

    def pair(self) -> tuple[Tensor, Tensor]:
        """generated, real. Raises UserError without real pictures."""
        if self.real is None:
            raise UserError("there are no reference pictures to measure a distance to: choose metrics that need none")
        return self.generated, self.real


Measure = Callable[[Features], dict[str, float]]


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
    (mean_a, a), (mean_b, b) = _moments(features_a), _moments(features_b)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,), and a triangular root R (at most D rows) with R^T R the covariance, gathered over some rows at a time."""
    n = len(features)
    mean = sum(part.double().sum(dim=0) for part in features.split(_ROWS)) / n
    root = mean.new_zeros(0, features.shape[1])
    for part in features.split(_ROWS):
        centered = (part.double() - mean).div_((n - 1) ** 0.5)
        root = torch.linalg.qr(torch.cat([root, centered]), mode="r").R
    return mean, root


def frechet(features: Features) -> dict[str, float]:
    return {"frechet": frechet_distance(*features.pair())}


@dataclass(frozen=True)
class Jackknife:
    """A measure with confidence intervals from leaving out one of `groups` equal parts of the captions at a time
    (Efron & Tibshirani 1993, chapter 11). It costs `groups` more measurements.
    """

    measure: Measure
    groups: int = 10

    def __call__(self, features: Features) -> dict[str, float]:
        values = self.measure(features)
        group = torch.arange(len(features.generated)) % self.groups
        parts = [self.measure(features.only(group != g)) for g in range(self.groups)]
        return values | {f"{name}/ci95": _jackknife_ci95([part[name] for part in parts]) for name in values}


def _jackknife_ci95(parts: list[float]) -> float:
    left_out = torch.tensor(parts, dtype=torch.float64)
    return Z95 * float(((len(parts) - 1) * left_out.var(correction=0)).sqrt())


def kernel_distance(features: Features, subsets: int = 100, size: int = 1000) -> dict[str, float]:
    """KID (Bińkowski et al. 2018): the unbiased MMD² of the kernel (x·y/D + 1)³, the mean over random subsets.

    size: of a subset; half of the pictures where there are not more. Raises UserError for fewer than four pictures.
    """
    a, b = (part.double() for part in features.pair())
    size = size if len(a) > size else len(a) // 2
    if size < 2:
        raise UserError(f"the kernel distance of {len(a)} pictures is not defined; give at least four")
    rng = np.random.RandomState(_SEED)
    values = []
    for _ in range(subsets):
        x, y = (part[torch.from_numpy(rng.choice(len(part), size, replace=False))] for part in (a, b))
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(float(within / (size * (size - 1)) - 2 * xy.mean()))
    return {"kid": float(np.mean(values)), "kid/std": float(np.std(values))}


def inception_score(features: Features, splits: int = 10) -> dict[str, float]:
    """exp of the mean divergence of a picture's class probabilities from their mean (Salimans et al. 2016), over splits.

    Raises UserError for a network without classes, or more splits than pictures.
    """
    if features.logits is None or len(features.logits) < splits:
        raise UserError(f"the Inception score needs a network with classes and at least {splits} pictures")
    n = len(features.logits)
    order = torch.from_numpy(np.random.RandomState(_SEED).permutation(n))
    log_p = features.logits[order].double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        divergence = part.exp() * (part - part.exp().mean(dim=0).log())
        scores.append(float(divergence.sum(dim=1).mean().exp()))
    return {"inception_score": float(np.mean(scores)), "inception_score/std": float(np.std(scores))}


def precision_recall(features: Features, k: int = 3) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), on balls to the k-th
    neighbor. The papers take k = 3 for the first two and k = 5 for the others.

    Raises UserError for fewer than k + 1 pictures.
    """
    generated, real = (part.double() for part in features.pair())
    if len(real) <= k:
        raise UserError(f"precision and recall with k={k} need more than {k} pictures; there are {len(real)}")
    radius_generated, radius_real = _radii(generated, k), _radii(real, k)
    reached = torch.zeros(len(real), dtype=torch.bool)
    covered, inside = reached.clone(), []
    for rows, radius in zip(generated.split(_DISTANCES), radius_generated.split(_DISTANCES), strict=True):
        distance = torch.cdist(rows, real)
        within = distance <= radius_real
        inside.append(within.sum(dim=1))
        covered |= within.any(dim=0)
        reached |= (distance <= radius[:, None]).any(dim=0)
    counts = torch.cat(inside).double()
    each = {"precision": counts > 0, "recall": reached, "density": counts / k, "coverage": covered}
    return {key: value for name, rows in each.items() for key, value in mean_of(name, rows.double()).items()}


def _radii(features: Tensor, k: int) -> Tensor:
    """(N,) distance to the k-th neighbor; the nearest of all is the row itself."""
    parts = [torch.cdist(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(_DISTANCES)]
    return torch.cat(parts)


def clip_score(features: Features) -> dict[str, float]:
    """The mean cosine between a picture's and its caption's embedding, raw and times 100; never clamped at 0.

    Raises UserError for a network that does not read captions.
    """
    if features.text is None:
        raise UserError("a CLIP score needs a network that reads captions too: give features of a CLIP")
    cosine = cosines(features.generated, features.text)
    return {**mean_of("clip_cosine", cosine), **mean_of("clip_cosine_x100", 100 * cosine)}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N,) of the rows of (N, D), float64."""
    return (F.normalize(a.double(), dim=1) * F.normalize(b.double(), dim=1)).sum(dim=1)


def cmmd(features: Features, sigma: float = 10.0, groups: int = 10) -> dict[str, float]:
    """1000 × the MMD² of a Gaussian kernel on unit vectors (Jayasumana et al. 2024), diagonals included as published.

    The interval is a jackknife over `groups`, at no further cost.
    """
    x, y = (F.normalize(part.double(), dim=1) for part in features.pair())
    groups = min(groups, len(x))
    pairs = {"xx": (x, x), "yy": (y, y), "xy": (x, y)}
    sums = {name: _kernel_sums(a, b, sigma, groups) for name, (a, b) in pairs.items()}
    sizes = torch.tensor([len(x[g::groups]) for g in range(groups)])

    def value(keep: Tensor) -> float:
        total = {name: part[keep][:, keep].sum() for name, part in sums.items()}
        return float(1000 * (total["xx"] + total["yy"] - 2 * total["xy"]) / sizes[keep].sum() ** 2)

    every = torch.arange(groups)
    values = {"cmmd": value(every)}
    if groups > 1:
        values["cmmd/ci95"] = _jackknife_ci95([value(every[every != g]) for g in range(groups)])
    return values


def _kernel_sums(a: Tensor, b: Tensor, sigma: float, groups: int) -> Tensor:
    """(groups, groups): the sums of exp(-|a - b|²/(2σ²)) over pairs of parts, one pair in memory at a time."""

    def one(p: Tensor, q: Tensor) -> Tensor:
        squares = p.square().sum(dim=1)[:, None] + q.square().sum(dim=1) - 2 * p @ q.T
        return squares.div_(-2 * sigma**2).exp_().sum()

    return torch.stack([torch.stack([one(a[i::groups], b[j::groups]) for j in range(groups)]) for i in range(groups)])


def mean_of(name: str, values: Tensor) -> dict[str, float]:
    """The mean of (N,) values and its interval; none for a single value."""
    out = {name: float(values.mean())}
    if len(values) > 1:
        out[f"{name}/ci95"] = Z95 * float(values.std() / len(values) ** 0.5)
    return out


def share_of(name: str, count: int, n: int) -> dict[str, float]:
    """count / n with half the width of Wilson's interval, which at 0 and 1 is not empty."""
    p, z = count / n, Z95**2 / n
    return {name: p, f"{name}/ci95": Z95 * (p * (1 - p) / n + z / (4 * n)) ** 0.5 / (1 + z)}
