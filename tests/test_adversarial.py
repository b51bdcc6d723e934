from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import process
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.training.adversarial import BCE, Adversary, Hinge


class Linear(nn.Module):
    """logits = <weight, picture>: closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 2, 2))

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.weight).sum(dim=(1, 2, 3))


def pictures(seed: int) -> Tensor:
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_losses_are_the_papers():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    torch.testing.assert_close(Hinge().discriminator(real, fake), torch.tensor((0.5 + 2) / 6 + (1 + 2) / 6))
    torch.testing.assert_close(Hinge().generator(fake), torch.tensor(1 / 3))
    cross_entropy = nn.BCEWithLogitsLoss()
    expected = 0.5 * (cross_entropy(real, torch.ones(3)) + cross_entropy(fake, torch.zeros(3)))
    torch.testing.assert_close(BCE().discriminator(real, fake), expected)
    torch.testing.assert_close(BCE().generator(fake), cross_entropy(fake, torch.ones(3)))


def terms(adversary: Adversary, step: int = 0, loss: Callable[[Tensor], Tensor] = lambda x: x.square().mean()):
    last = nn.Parameter(torch.ones(3, 1, 1))
    fake = last * pictures(1)
    return adversary(pictures(0), fake, loss(fake), last, step), last, fake


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer():
    for per_image, scale in ((True, 12), (False, 1)):
        adversary = Adversary(Linear(), Hinge(), weight=0.5, start=0, per_image=per_image)
        (generator, _, logs), last, fake = terms(adversary)
        (plain,) = torch.autograd.grad(fake.square().mean(), last, retain_graph=True)
        (slope,) = torch.autograd.grad(-adversary.discriminator(fake).mean(), last, retain_graph=True)
        expected = scale * plain.norm() / (slope.norm() + 1e-4) / scale
        torch.testing.assert_close(logs["train/adversary_scale"], expected)
        (got,) = torch.autograd.grad(generator, last)
        torch.testing.assert_close(got, 0.5 * expected * slope)


def test_the_limit_cuts_where_the_published_one_does():
    """Of a loss that is summed over a picture, 1e4 is 1e4 / elements of one that is averaged."""
    for per_image, expected in ((True, 0.3 / 12), (False, 0.3)):
        adversary = Adversary(Linear(), Hinge(), start=0, per_image=per_image, limit=0.3)
        (_, _, logs), *_ = terms(adversary, loss=lambda x: 1e3 * x.square().mean())
        torch.testing.assert_close(logs["train/adversary_scale"], torch.tensor(expected))


def test_the_gradient_penalty():
    adversary = Adversary(Linear(), Hinge(), start=0, r1=2.0)
    weight = adversary.discriminator.weight
    (_, discriminator, logs), *_ = terms(adversary)
    torch.testing.assert_close(logs["train/r1"], weight.detach().square().sum())
    (_, plain, _), *_ = terms(Adversary(adversary.discriminator, Hinge(), start=0))
    torch.testing.assert_close(discriminator - plain, weight.square().sum())
    assert (discriminator - plain).requires_grad


def test_bad_arguments():
    with pytest.raises(UserError, match=r"r1=-1.0; none may be negative"):
        Adversary(Linear(), Hinge(), r1=-1.0)


def test_two_ranks_stay_equal_and_equal_one_with_the_whole_batch(tmp_path: Path):
    """Three steps, of which two with the adversary and its adaptive weight."""
    weights = []
    for world in (1, 2):
        done = process("tests/sharded_gan.py", str(world), str(tmp_path / f"{world}"))
        assert done.returncode == 0, done.stderr[-2000:]
        weights += [torch.load(tmp_path / f"{world}.{rank}", weights_only=True) for rank in range(world)]
    one, first, second = weights
    for name, value in one.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, equal_nan=True)
