import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm.models.layers import (
    GEGLU,
    Attention,
    Downsample,
    FeedForward,
    TransformerBlock,
    Upsample,
    per_token,
    sinusoidal,
    zero,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_zero_clears_and_returns_the_module():
    layer = nn.Conv2d(3, 4, 3)
    assert zero(layer) is layer
    assert not layer.weight.any()
    assert not layer.bias.any()


def test_sinusoidal_is_cosines_then_sines_at_geometric_frequencies():
    rows = sinusoidal(torch.tensor([0.0, 1.0, 250.5]), 8)
    assert rows.shape == (3, 8)
    for x, row in zip((0.0, 1.0, 250.5), rows, strict=True):
        angles = [x * 10_000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=2e-5)


def test_per_token_equals_the_convolution_on_the_grid():
    conv, x = nn.Conv2d(6, 5, 1), normal(2, 6, 3, 4)
    tokens = per_token(conv, x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, (3, 4)), conv(x))


def test_downsample_halves_and_upsample_doubles():
    assert Downsample(3)(normal(1, 3, 8, 6)).shape == (1, 3, 4, 3)
    up, x = Upsample(3), normal(1, 3, 2, 3)
    torch.testing.assert_close(up(x), up.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)))


def test_attention_equals_the_formula_by_hand():
    attention, x, context = Attention(6, heads=2, head_dim=4, context_width=5), normal(1, 3, 6), normal(1, 7, 5, seed=1)
    q, k, v = attention.to_q(x)[0], attention.to_k(context)[0], attention.to_v(context)[0]
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        heads.append(F.softmax(q[:, part] @ k[:, part].T / 2, dim=-1) @ v[:, part])  # sqrt(head_dim) = 2
    torch.testing.assert_close(attention(x, context)[0], attention.to_out(torch.cat(heads, dim=1)))


def test_masked_context_tokens_are_as_good_as_absent():
    attention, x, context = Attention(8, 2, 4, context_width=5), normal(2, 3, 8), normal(2, 6, 5, seed=1)
    mask = torch.arange(6).expand(2, 6) < 4
    torch.testing.assert_close(attention(x, context, mask), attention(x, context[:, :4]))


def test_geglu_gates_its_first_half_by_its_second():
    layer, x = GEGLU(4, 6), normal(2, 4)
    value, gate = layer.proj(x)[:, :6], layer.proj(x)[:, 6:]
    torch.testing.assert_close(layer(x), value * F.gelu(gate))
    assert FeedForward(4)(x).shape == (2, 4)


def test_the_mask_is_the_context_s_with_a_context_and_x_s_own_without():
    x, context, mask = normal(1, 4, 8), normal(1, 4, 8, seed=1), torch.tensor([[True, True, False, False]])
    cross, own = TransformerBlock(8, 2, 4, context_width=8), TransformerBlock(8, 2, 4)
    padded = context.clone()
    padded[:, 2:] = 9.0
    torch.testing.assert_close(cross(x, context, mask), cross(x, padded, mask))
    moved = x.clone()
    moved[:, 2:] = 9.0
    torch.testing.assert_close(own(x, mask=mask)[:, :2], own(moved, mask=mask)[:, :2])
    assert not torch.allclose(cross(x, context, mask)[:, :2], cross(moved, context, mask)[:, :2])  # x is not masked


@pytest.mark.parametrize("context_width", [None, 8])
def test_a_transformer_block_without_outputs_is_the_identity(context_width: int | None):
    block, x = TransformerBlock(8, 2, 4, context_width), normal(2, 5, 8)
    zero(block.attn1.to_out)
    zero(block.ff.net[2])
    if context_width:
        zero(block.attn2.to_out)
    torch.testing.assert_close(block(x, x), x)
