import math

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.models.quantizer import VectorQuantizer, usage


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_vector_becomes_its_nearest_row():
    quantizer, z = VectorQuantizer(16, 3), vectors(2, 3, 4, 5)
    torch.nn.init.normal_(quantizer.embedding.weight)
    codes = quantizer.nearest(z)
    distances = (z[:, None] - quantizer.embedding.weight[None, :, :, None, None]).square().sum(dim=2)
    assert torch.equal(codes, distances.argmin(dim=1))
    assert torch.equal(quantizer.lookup(codes)[1, :, 2, 3], quantizer.embedding.weight[codes[1, 2, 3]])


def test_the_loss_is_the_paper_s_and_the_gradient_goes_straight_through():
    quantizer, z = VectorQuantizer(8, 3, beta=0.25), vectors(2, 3, 4, 4).requires_grad_()
    torch.nn.init.normal_(quantizer.embedding.weight)
    out = quantizer(z)
    rows = quantizer.lookup(out.codes)
    torch.testing.assert_close(out.latents, rows)
    torch.testing.assert_close(out.penalty, 1.25 * (z - rows).square().mean(dim=(1, 2, 3)))
    (slope,) = torch.autograd.grad(out.latents.sum(), z, retain_graph=True)
    assert torch.equal(slope, torch.ones_like(z))
    (slope,) = torch.autograd.grad(out.penalty.mean(), z, retain_graph=True)
    torch.testing.assert_close(slope, 0.25 * 2 * (z - rows) / z.numel())
    (slope,) = torch.autograd.grad(out.penalty.mean(), quantizer.embedding.weight)
    chosen = torch.zeros(8, 3).index_add_(0, out.codes.flatten(), (rows - z).movedim(1, -1).flatten(0, 2))
    torch.testing.assert_close(slope, 2 * chosen / z.numel())


def test_equals_diffusers():
    from diffusers.models.autoencoders.vae import VectorQuantizer as Peer

    quantizer, z = VectorQuantizer(32, 4), vectors(2, 4, 6, 6)
    peer = Peer(32, 4, beta=0.25, legacy=False)
    peer.embedding.weight.data.copy_(quantizer.embedding.weight.data)
    expected, loss, (_, _, codes) = peer(z)
    out = quantizer(z)
    torch.testing.assert_close(out.latents, expected)
    torch.testing.assert_close(out.penalty.mean(), loss)
    assert torch.equal(out.codes.flatten(), codes)


def test_moving_averages_find_the_clusters():
    centers = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    quantizer = VectorQuantizer(3, 2, decay=0.8)
    assert list(quantizer.parameters()) == []
    quantizer.embedding.weight.copy_(0.1 * centers)
    for step in range(60):
        z = centers[torch.arange(48) % 3].T.reshape(1, 2, 6, 8) + 0.1 * vectors(1, 2, 6, 8, seed=step)
        quantizer.learn(z, quantizer.nearest(z), KeyedRandom(0, torch.tensor([step])))
    torch.testing.assert_close(quantizer.embedding.weight, centers, atol=0.05, rtol=0)
    torch.testing.assert_close(quantizer.share, torch.full((3,), 1 / 3), atol=0.01, rtol=0)


def test_dead_codes_come_back_where_the_vectors_are():
    def run(revive_below: float) -> VectorQuantizer:
        torch.manual_seed(0)
        quantizer = VectorQuantizer(16, 2, decay=0.9, revive_below=revive_below)
        for step in range(100):
            z = 5 + vectors(4, 2, 4, 4, seed=step)  # far from where all rows begin
            quantizer.learn(z, quantizer.nearest(z), KeyedRandom(0, torch.arange(4) + 4 * step))
        return quantizer

    z = 5 + vectors(64, 2, 4, 4, seed=1000)
    used = [torch.bincount(q.nearest(z).flatten(), minlength=16).gt(0).sum() for q in (run(0.0), run(0.2))]
    assert used[0] < 6
    assert used[1] == 16


def test_usage_and_perplexity():
    values = usage(torch.tensor([5, 5, 0, 0]))
    assert float(values["usage"]) == 0.5
    assert math.isclose(float(values["perplexity"]), 2.0)
    assert math.isclose(float(usage(torch.full((7,), 3))["perplexity"]), 7.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": 0}, "0 codes of width 3; give at least 2"),
        ({"decay": 1.0}, r"decay is 1.0; give a number in \(0, 1\)"),
        ({"revive_below": 0.1}, "give a decay too"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        VectorQuantizer(**({"codes": 4, "width": 3} | options))


def test_codes_are_chosen_in_float32_under_autocast():
    """bfloat16 would choose others: neighbors are close."""
    quantizer, z = VectorQuantizer(4096, 3), vectors(2, 3, 16, 16)
    torch.nn.init.normal_(quantizer.embedding.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), quantizer.nearest(z.double().float()))
        codes = quantizer.nearest(z)
    assert torch.equal(codes, quantizer.nearest(z))
