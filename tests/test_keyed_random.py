import hashlib

import pytest
import torch

from ldm.keyed_random import KeyedRandom

INDEX = torch.arange(1000)


def reference_hash(seed: int, purpose: str, index: int, n: int) -> list[int]:
    """SplitMix64 in Python's integers, as published: state advances by the golden gamma, each state is mixed."""
    wrap, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & wrap
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & wrap
        return z ^ (z >> 31)

    key = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
    base = mix((index * gamma + key) & wrap)
    return [mix((base + i * gamma) & wrap) for i in range(1, n + 1)]


def test_the_stream_is_splitmix64():
    index = [0, 1, 2**40, 2**63 - 1]
    uniform = KeyedRandom(3, torch.tensor(index)).uniform("t", (2, 3))
    expected = [[((bits >> 38) + 0.5) / 2**26 for bits in reference_hash(3, "t", i, 6)] for i in index]
    assert uniform.flatten(1).tolist() == expected


def test_pinned_values():
    """A change here changes every run's noise: runs no longer resume exactly. Do it only on purpose."""
    random = KeyedRandom(0, torch.tensor([0, 1, 2**40]))
    torch.testing.assert_close(
        random.uniform("t"), torch.tensor([0.3222406730, 0.7765439972, 0.7883117422]).double(), rtol=0, atol=1e-7
    )
    expected = [
        [1.1777262688, -0.4465160072, -0.6379855275],
        [0.5476070642, 0.1120206341, -0.2576418817],
        [-0.3178587556, -2.2166433334, 0.2487146407],
    ]
    torch.testing.assert_close(random.normal("noise", (3,)), torch.tensor(expected), rtol=0, atol=1e-6)


def test_normal_moments():
    draws = KeyedRandom(0, INDEX).normal("noise", (3, 17, 21)).double()
    assert draws.shape == (1000, 3, 17, 21)
    n = draws.numel()  # 1.07 million: bounds are 4 standard errors
    assert abs(draws.mean()) < 4 / n**0.5
    assert abs(draws.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((draws**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_uniform_is_flat_and_open():
    draws = KeyedRandom(0, INDEX).uniform("t", (1000,))
    assert draws.dtype == torch.float64
    assert 0 < draws.min() < 1e-5
    assert 1 - 1e-5 < draws.max() < 1
    counts = torch.histc(draws, bins=100, min=0, max=1)
    assert (counts - 1e4).square().sum() / 1e4 < 160  # chi-squared with 99 degrees of freedom: p < 1e-4
    assert (KeyedRandom(0, INDEX).normal("noise", (7,)).isfinite()).all()


def test_a_row_does_not_know_its_batch():
    whole = KeyedRandom(5, INDEX[:64])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for rows in (order, torch.tensor([7]), torch.tensor([7, 7, 3]), torch.arange(13, 30)):
        part = KeyedRandom(5, rows)
        assert torch.equal(part.normal("noise", (4, 5, 3)), whole.normal("noise", (4, 5, 3))[rows])
        assert torch.equal(part.uniform("t"), whole.uniform("t")[rows])
    assert torch.equal(KeyedRandom(5, torch.tensor([9], dtype=torch.int32)).uniform("t"), whole.uniform("t")[9:10])


def normal(seed: int, purpose: str, first: int) -> torch.Tensor:
    return KeyedRandom(seed, torch.arange(first, first + 500)).normal(purpose, (200,)).flatten()


@pytest.mark.parametrize(
    "other", [(0, "noise 2", 0), (1, "noise", 0), (0, "noise", 500), (0, "noise", 1)], ids=lambda o: str(o)
)
def test_other_keys_give_unrelated_draws(other: tuple[int, str, int]):
    correlation = torch.corrcoef(torch.stack([normal(0, "noise", 0), normal(*other)]))[0, 1]
    assert abs(correlation) < 4 / 1e5**0.5


def test_neighboring_draws_are_unrelated():
    draws = KeyedRandom(0, INDEX).normal("noise", (400,))
    across_samples = torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1]
    # the two Box-Muller branches of one hash lie 200 apart
    between_branches = torch.corrcoef(torch.stack([draws[:, :200].flatten(), draws[:, 200:].flatten()]))[0, 1]
    assert abs(across_samples) < 4 / draws.numel() ** 0.5
    assert abs(between_branches) < 4 / (draws.numel() / 2) ** 0.5
