import torch
from torch import nn
from torch.nn.functional import l1_loss

from ldm.training.reconstruction_loss import ReconstructionLoss


class Far(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().sum(dim=(1, 2, 3))


def l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return l1_loss(a, b, reduction="none")


def test_the_likelihood_is_the_published_one():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    loss = ReconstructionLoss(l1, Far(), perceptual_weight=0.5, learn_logvar=True)
    loss.logvar.data.fill_(0.3)
    out = loss(a, b)
    # CompVis: per element |a - b| + weight p, over exp(logvar), plus logvar; summed over a picture, here averaged
    element = (a - b).abs() + 0.5 * Far()(a, b).view(2, 1, 1, 1)
    torch.testing.assert_close(out.loss, (element / loss.logvar.exp() + loss.logvar).mean())
    torch.testing.assert_close(out.distance, (a - b).abs().mean())
    torch.testing.assert_close(out.perceptual, Far()(a, b).mean())


def test_the_noise_level_moves_to_its_optimum():
    """At its best, exp(logvar) is the mean distance."""
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.4)
    loss = ReconstructionLoss(l1, learn_logvar=True)
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(a, b).loss.backward()
        optimizer.step()
    torch.testing.assert_close(loss.logvar.exp().detach(), torch.tensor(0.4), rtol=1e-2, atol=0)


def test_pixels_alone():
    loss = ReconstructionLoss(l1)
    assert list(loss.parameters()) == []
    out = loss(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2))
    assert out.perceptual is None
    assert out.loss == out.distance == 1
