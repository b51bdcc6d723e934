import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.models.discriminator import PatchDiscriminator


def test_parameter_count_and_patches_are_pix2pix_s():
    network = PatchDiscriminator()
    assert sum(p.numel() for p in network.parameters()) == 2_765_633  # pix2pix' layers, for 3 channels
    assert network(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_a_patch_is_70_pixels():
    network, x = PatchDiscriminator(4, batch_norm=False), torch.zeros(1, 3, 128, 128, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x)[0, 0, 7, 7], x)
    rows = slope.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_spectral_normalization_bounds_every_layer():
    network = PatchDiscriminator(4, layers=2, batch_norm=False, spectral=True)
    for _ in range(30):
        network(torch.randn(2, 3, 16, 16))
    network.eval()
    for layer in network.main:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.02


def test_bad_arguments():
    with pytest.raises(UserError, match="one normalization at most"):
        PatchDiscriminator(spectral=True)
    with pytest.raises(UserError, match="at least one layer"):
        PatchDiscriminator(layers=0)
