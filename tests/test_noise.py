import pytest
import torch

from ldm.diffusion.noise import BrownianPath
from ldm.keyed_random import KeyedRandom

MANY = KeyedRandom(0, torch.arange(40_000))


def test_steps_get_standard_normal_independent_noise():
    path = BrownianPath(MANY, (1, 1, 1))
    steps = [(80.0, 14.0), (14.0, 3.0), (3.0, 2.9), (2.9, 0.3), (0.3, 0.0)]
    draws = torch.stack([path(*step).flatten() for step in steps])
    assert draws.dtype == torch.float32
    torch.testing.assert_close(draws.mean(dim=1), torch.zeros(5), rtol=0, atol=0.02)
    torch.testing.assert_close(draws.cov(), torch.eye(5), rtol=0, atol=0.03)


def test_a_long_step_is_made_of_short_ones():
    path = BrownianPath(KeyedRandom(3, torch.arange(5)), (2, 4, 4))
    time = lambda sigma: sigma / (1 + sigma)  # noqa: E731
    length = lambda a, b: (time(a) - time(b)) ** 0.5  # noqa: E731
    whole = path(10.0, 1.0) * length(10.0, 1.0)
    parts = path(10.0, 4.0) * length(10.0, 4.0) + path(4.0, 1.0) * length(4.0, 1.0)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


def test_the_order_of_the_questions_does_not_matter():
    random = KeyedRandom(3, torch.arange(5))
    one, other = BrownianPath(random, (2, 4, 4)), BrownianPath(random, (2, 4, 4))
    forward = [one(4.0, 2.0), one(2.0, 1.0)]
    backward = [other(2.0, 1.0), other(4.0, 2.0)]
    assert torch.equal(forward[0], backward[1])
    assert torch.equal(forward[1], backward[0])


@pytest.mark.parametrize(("seed", "index"), [(0, 1), (1, 0)])
def test_another_seed_or_sample_is_another_path(seed: int, index: int):
    draws = [BrownianPath(KeyedRandom(s, torch.tensor([i])), (1, 8, 8))(2.0, 1.0) for s, i in ((0, 0), (seed, index))]
    assert not torch.allclose(*draws)
