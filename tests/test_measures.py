"""Every measure against its definition, written out another way, or against its authors' estimator."""

import itertools

import mpmath
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation import measures
from ldm.evaluation.measures import (
    Features,
    Jackknife,
    clip_score,
    cmmd,
    frechet,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_of,
    precision_recall,
    share_of,
)


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


def exactly(a: Tensor, b: Tensor) -> float:
    """The same to 40 digits: the trace is the sum of the square roots of the eigenvalues of X X^T, X = A B^T of centered rows."""
    with mpmath.workdps(40):
        (mean_a, a_), (mean_b, b_) = (_centered(mpmath.matrix(part.tolist())) for part in (a, b))
        cross = a_ * b_.T
        roots = (mpmath.sqrt(abs(value)) for value in mpmath.eigsy(cross * cross.T, eigvals_only=True))
        apart = mpmath.fsum((x - y) ** 2 for x, y in zip(mean_a, mean_b, strict=True))
        return float(apart + mpmath.fsum(x * x for part in (a_, b_) for x in part) - 2 * mpmath.fsum(roots))


def _centered(rows: mpmath.matrix) -> tuple[list[mpmath.mpf], mpmath.matrix]:
    """The mean, and the centered rows over sqrt(n - 1)."""
    n, width = rows.rows, rows.cols
    mean = [mpmath.fsum(rows[i, j] for i in range(n)) / n for j in range(width)]
    scale = mpmath.sqrt(n - 1)
    return mean, mpmath.matrix([[(rows[i, j] - mean[j]) / scale for j in range(width)] for i in range(n)])


@pytest.mark.parametrize(("n", "m", "width"), [(10, 7, 32), (12, 12, 48), (5, 40, 24)])
def test_frechet_of_fewer_rows_than_features(n: int, m: int, width: int):
    """Rank-deficient covariances: within 1e-6 of scipy's matrix square root, and far nearer to the exact value."""
    a, b = features(n, width, 0), features(m, width, 1)
    assert frechet_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(exactly(a, b), rel=1e-13)


def test_frechet_of_few_rows_that_are_nearly_the_same():
    """Where scipy's matrix square root of a singular product is off, the error is its own."""
    a = features(8, 24, 0)
    b = a + 1e-3 * features(8, 24, 2)
    exact = exactly(a, b)
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-7)
    assert abs(frechet_distance(a, b) - exact) < 1e-3 * abs(by_definition(a, b) - exact)


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


def test_frechet_does_not_depend_on_how_many_rows_are_taken_together(monkeypatch: pytest.MonkeyPatch):
    a, b = features(90, 24, 0), features(70, 24, 1)
    whole = frechet_distance(a, b)
    for rows in (7, 24, 89):
        monkeypatch.setattr(measures, "_ROWS", rows)
        assert frechet_distance(a, b) == pytest.approx(whole, rel=1e-11)


def test_frechet_of_float32_features_far_from_the_origin():
    """A covariance from sums of squares, or in float32, would cancel to noise."""
    a, b = (features(300, 16, seed) * 0.01 + 1000 for seed in (0, 1))
    assert frechet_distance(a.float(), b.float()) == pytest.approx(
        by_definition(a.float().double(), b.float().double()), rel=1e-6
    )


def pair(n: int = 60, width: int = 8) -> Features:
    return Features(features(n, width, 0).float(), features(n, width, 0).float().roll(3, dims=1) + 0.5)


def test_the_jackknife_equals_leaving_groups_out_by_hand():
    seen = pair(23)
    values = Jackknife(frechet, groups=5)(seen)
    parts = []
    for g in range(5):
        keep = [i for i in range(23) if i % 5 != g]
        parts.append(frechet_distance(seen.generated[keep], seen.real[keep]))
    assert values["frechet"] == frechet_distance(seen.generated, seen.real)
    expected = 1.96 * np.sqrt(4 / 5 * np.square(np.array(parts) - np.mean(parts)).sum())
    assert values["frechet/ci95"] == pytest.approx(expected, rel=1e-9)


def test_jackknife_intervals_hold_the_truth_nearly_always():
    """Of the mean of normal numbers, whose interval is known."""
    generator = torch.Generator().manual_seed(0)
    average = Jackknife(lambda seen: {"mean": float(seen.generated.mean())}, groups=20)
    hits = 0
    for _ in range(200):
        values = average(Features(torch.randn(100, 1, generator=generator, dtype=torch.float64)))
        hits += abs(values["mean"]) <= values["mean/ci95"]
    assert 0.88 <= hits / 200 <= 0.99


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased MMD^2 of the cubic kernel, pair by pair."""

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return (p @ q / len(p) + 1) ** 3

    n = len(x)
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(p, q) for p in x for q in y) / n**2


def test_kernel_distance_is_the_mean_over_torch_fidelity_s_subsets():
    seen = pair(20, 5)
    values = kernel_distance(seen, subsets=4, size=9)
    rng = np.random.RandomState(2020)
    expected = []
    for _ in range(4):
        x, y = (part.double().numpy()[rng.choice(20, 9, replace=False)] for part in (seen.generated, seen.real))
        expected.append(by_loops(x, y))
    assert values == pytest.approx({"kid": np.mean(expected), "kid/std": np.std(expected)}, rel=1e-9)


def test_kernel_distance_of_the_same_distribution_is_about_zero():
    a = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    near, far = (kernel_distance(Features(a[:200], a[200:] + shift), subsets=9) for shift in (0, 1))
    assert abs(near["kid"]) < 0.1 * far["kid"]
    assert near["kid/std"] > 0  # of 200 pictures, subsets of 100
    assert near == kernel_distance(Features(a[:200], a[200:]), subsets=9, size=100)


def test_inception_score_by_definition():
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * 3
    values = inception_score(Features(logits, logits=logits), splits=4)
    p = torch.softmax(logits.double(), dim=1).numpy()[np.random.RandomState(2020).permutation(40)]
    parts = [p[i : i + 10] for i in range(0, 40, 10)]
    scores = [np.exp(np.mean([np.sum(row * np.log(row / part.mean(0))) for row in part])) for part in parts]
    assert values == pytest.approx(
        {"inception_score": np.mean(scores), "inception_score/std": np.std(scores)}, rel=1e-9
    )
    certain = torch.eye(10).repeat(10, 1) * 50
    assert inception_score(Features(certain, logits=certain), splits=1)["inception_score"] == pytest.approx(
        10, rel=1e-6
    )


def test_precision_recall_density_coverage_by_loops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "_DISTANCES", 7)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator) * 1.5 + 0.7
    values = precision_recall(Features(a, b), k=3)
    x, y = a.double().numpy(), b.double().numpy()

    def radius(of: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(of[i] - q) for j, q in enumerate(of) if j != i)[2]

    within = np.array([[np.linalg.norm(p - y[j]) <= radius(y, j) for j in range(30)] for p in x])
    reached = [any(np.linalg.norm(q - x[i]) <= radius(x, i) for i in range(30)) for q in y]
    expected = {"precision": within.any(1).mean(), "recall": np.mean(reached), "density": within.sum(1).mean() / 3,
                "coverage": within.any(0).mean()}  # fmt: skip
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["recall"] < 1
    assert values["precision/ci95"] == pytest.approx(1.96 * within.any(1).std(ddof=1) / 30**0.5)


def test_all_of_one_set_is_precise_and_recalled():
    a = features(30, 4, 0)
    values = precision_recall(Features(a, a.clone()), k=3)
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    far = precision_recall(Features(a + 1e4, a), k=3)
    assert far["precision"] == far["recall"] == far["density"] == far["coverage"] == 0


def test_clip_score_is_the_mean_cosine_raw_and_times_a_hundred_and_never_clamped():
    a, t = features(9, 5, 0), -features(9, 5, 0) + torch.eye(9, 5)
    values = clip_score(Features(a.float(), text=t.float()))
    each = [float(torch.dot(x, y) / x.norm() / y.norm()) for x, y in zip(a, t, strict=True)]
    assert values["clip_cosine"] == pytest.approx(np.mean(each), rel=1e-6)
    assert values["clip_cosine"] < 0
    assert values["clip_cosine_x100"] == pytest.approx(100 * np.mean(each), rel=1e-6)
    assert values["clip_cosine/ci95"] == pytest.approx(1.96 * np.std(each, ddof=1) / 3, rel=1e-5)


def published_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """1000 (E k(x,x') + E k(y,y') - 2 E k(x,y)), k = exp(-|x-y|^2 / 200), over all pairs, of unit vectors."""
    x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x, y))
    mean = lambda p, q: np.mean([np.exp(-np.square(u - v).sum() / 200) for u, v in itertools.product(p, q)])  # noqa: E731
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize(("n", "groups"), [(12, 10), (12, 4), (3, 10)])
def test_cmmd_equals_the_published_formula_and_its_interval_leaves_groups_out(n: int, groups: int):
    seen = pair(n, 6)
    values = cmmd(seen, groups=groups)
    x, y = seen.generated.double().numpy(), seen.real.double().numpy()
    assert values["cmmd"] == pytest.approx(published_cmmd(x, y), rel=1e-9)
    groups = min(groups, n)
    keeps = [[i for i in range(n) if i % groups != g] for g in range(groups)]
    parts = np.array([published_cmmd(x[keep], y[keep]) for keep in keeps])
    assert values["cmmd/ci95"] == pytest.approx(1.96 * np.sqrt((groups - 1) * parts.var()), rel=1e-6)


def test_what_is_missing_is_said():
    alone = Features(features(30, 4, 0))
    for measure in (frechet, kernel_distance, precision_recall, cmmd):
        with pytest.raises(UserError, match="no reference pictures"):
            measure(alone)
    with pytest.raises(UserError, match="needs a network that reads captions"):
        clip_score(pair())
    with pytest.raises(UserError, match="needs a network with classes and at least 10 pictures"):
        inception_score(pair())
    with pytest.raises(UserError, match="need more than 3 pictures; there are 3"):
        precision_recall(pair(3))
    with pytest.raises(UserError, match="of 3 pictures is not defined; give at least four"):
        kernel_distance(Features(torch.zeros(3, 4), torch.zeros(3, 4)))


def test_shares_and_means_come_with_their_intervals():
    assert share_of("a", 30, 40)["a"] == 0.75
    assert share_of("a", 30, 40)["a/ci95"] == pytest.approx(0.130, abs=2e-3)  # Wilson's, by hand
    assert 0 < share_of("a", 0, 40)["a/ci95"] < 0.1
    assert mean_of("m", torch.tensor([1.0, 3.0])) == pytest.approx({"m": 2, "m/ci95": 1.96})
    assert mean_of("m", torch.tensor([1.0])) == {"m": 1}
