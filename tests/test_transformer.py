"""What DiT and MMDiT share; test_dit.py and test_mmdit.py hold them against diffusers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_unet import conditioning, normal
from tiny import randomized
from torch import Tensor

from ldm.errors import UserError
from ldm.models.dit import DiT
from ldm.models.layers import Attention, rotate
from ldm.models.mmdit import MMDiT
from ldm.models.transformer import PatchTransformer, SwiGLU, coordinates, rotary, sin_cos, unpatchify

CPU = torch.device("cpu")
SIZES = {"in_channels": 4, "out_channels": 3, "width": 16, "depth": 2, "heads": 2, "context_channels": 6,
         "vector_channels": 3}  # fmt: skip


def dit(**changes: Any) -> DiT:
    return DiT(**(SIZES | changes))


def mmdit(**changes: Any) -> MMDiT:
    return MMDiT(**(SIZES | {"side": 8} | changes))


both = pytest.mark.parametrize("make", [dit, mmdit])
Make = Callable[..., PatchTransformer]


@pytest.mark.parametrize("base", [None, 4])
def test_positions_equal_diffusers(base: int | None):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    height, width = 6, 6 if base is None else 10  # diffusers counts patches only on a square of its base size
    expected = get_2d_sincos_pos_embed(16, (height, width), base_size=base or 6)
    torch.testing.assert_close(sin_cos(coordinates(height, width, base, CPU), 16), expected.float())


def test_rotary_positions_equal_diffusers():
    from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed

    x = normal(2, 3, 24, 8)
    angles = get_2d_rotary_pos_embed(8, ((0, 0), (4, 6)), (4, 6))
    torch.testing.assert_close(rotate(x, rotary(coordinates(4, 6, None, CPU), 8)), apply_rotary_emb(x, angles))


def test_rotary_attention_sees_distances_only():
    """On a grid that goes on to the left and above, the same features attend alike."""
    attention, x = randomized(Attention(16, 2, 8)), normal(1, 12, 16)
    columns, rows = coordinates(3, 4, None, CPU)
    with torch.no_grad():
        here = attention(x, rotation=rotary((columns, rows), 8))
        torch.testing.assert_close(attention(x, rotation=rotary((columns + 5, rows + 9), 8)), here)
        assert (attention(x, rotation=rotary((2 * columns, rows), 8)) - here).abs().max() > 1e-3


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant():
    attention, x = randomized(Attention(16, 2, 8, qk_norm=True)), normal(2, 5, 16)
    with torch.no_grad():
        before = attention(x)
        for layer in (attention.to_q, attention.to_k):
            layer.weight *= 100
        torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-4)


def test_swiglu_equals_diffusers():
    from diffusers.models.activations import SwiGLU as Peer

    ours, peer, x = SwiGLU(6, 10), Peer(6, 10), normal(2, 3, 6)
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), peer(x))


def test_unpatchify_undoes_patches():
    x = normal(2, 3, 4, 6)
    patches = x.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 12)  # (B, h * w, p * p * C)
    torch.testing.assert_close(unpatchify(patches, 2, 3, 2), x)


@both
@pytest.mark.parametrize("patch", [1, 2])
def test_the_ends_are_inverse_and_the_center_has_the_patches_in_order(make: Make, patch: int):
    """Blocks that do nothing, and ends that copy: the output is the input plus positions, taken apart here."""
    network = make(in_channels=4, out_channels=4, width=4 * patch**2, patch=patch)
    network.transform = lambda x, *_: x
    network.norm_out = torch.nn.Identity()
    with torch.no_grad():  # (p * p * C, C, p, p): each feature is one pixel of one channel
        copy = torch.eye(4 * patch**2).view(-1, patch, patch, 4).permute(0, 3, 1, 2)
        network.patch_embed.weight.copy_(copy)
        network.out.weight.copy_(torch.eye(4 * patch**2))
    x = normal(2, 4, 4, 6)
    torch.testing.assert_close(network(x, torch.zeros(2), conditioning(2, 6, 3)), x)


@both
def test_a_fresh_network_returns_zero_and_learns(make: Make):
    network, x, cond = make(), normal(2, 4, 8, 8), conditioning(2, 6, 3)
    output = network(x, torch.tensor([0.1, 0.9]), cond)
    assert output.shape == (2, 3, 8, 8)
    assert not output.any()
    (output - x[:, :3]).square().mean().backward()
    assert network.out.weight.grad.any()


@both
def test_fresh_blocks_are_identities(make: Make):
    network, x, cond = make(checkpointing=True), normal(2, 16, 16), conditioning(2, 6, 3)
    network.pos_embed = torch.zeros(1, 64, 16)  # MMDiT's positions; DiT's are left out
    network.sin_cos = False
    torch.testing.assert_close(network.transform(x, (4, 4), normal(2, 16, seed=3), cond), x)


@both
@pytest.mark.filterwarnings("error")
def test_bfloat16_stays_close(make: Make):
    network, x, cond = randomized(make(qk_norm=True)), normal(2, 4, 8, 8), conditioning(2, 6, 3)
    with torch.no_grad():
        exact = network(x, torch.tensor([0.1, 0.9]), cond)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x, torch.tensor([0.1, 0.9]), cond)
    assert (rounded - exact).square().mean().sqrt() < 0.03 * exact.std()


@both
def test_padding_tokens_do_not_matter(make: Make):
    network, cond = randomized(make()), conditioning(2, 6, 3)
    cond.mask[:, 3:] = False
    other = cond._replace(tokens=torch.where(cond.mask[..., None], cond.tokens, 7.0))
    shorter = cond._replace(tokens=cond.tokens[:, :3], mask=cond.mask[:, :3])
    x, noise = normal(2, 4, 8, 8), torch.tensor([0.5, 20.0])
    with torch.no_grad():
        output = network(x, noise, cond)
        assert output.std() > 0.01
        torch.testing.assert_close(network(x, noise, other), output)
        torch.testing.assert_close(network(x, noise, shorter), output)
        whole = cond._replace(mask=torch.ones_like(cond.mask))
        assert (network(x, noise, whole) - output).abs().max() > 1e-3


@both
@pytest.mark.parametrize("part", ["tokens", "vector", "c_noise"])
def test_every_input_matters(make: Make, part: str):
    network, cond = randomized(make()), conditioning(1, 6, 3)
    x, noise = normal(1, 4, 8, 8), torch.tensor([0.5])
    changed = cond if part == "c_noise" else cond._replace(**{part: getattr(cond, part) + 1})
    moved = noise + 1 if part == "c_noise" else noise
    with torch.no_grad():
        assert (network(x, noise, cond) - network(x, moved, changed)).abs().max() > 1e-3


@both
def test_positions_matter(make: Make):
    """Without them a transformer gives a picture with two patches exchanged as its own output, exchanged."""
    network, cond, x = randomized(make(patch=1)), conditioning(1, 6, 3), normal(1, 4, 4, 4)
    with torch.no_grad():
        exchanged = network(x.flip(3), torch.zeros(1), cond).flip(3)
        assert (exchanged - network(x, torch.zeros(1), cond)).abs().max() > 1e-3


@both
def test_any_resolution_and_aspect(make: Make):
    network, cond = randomized(make()), conditioning(2, 6, 3)
    for height, width in [(8, 8), (4, 12), (16, 2)]:
        assert network(normal(2, 4, height, width), torch.zeros(2), cond).shape == (2, 3, height, width)


@both
def test_noise_scale_multiplies_the_noise_label(make: Make):
    plain, scaled = randomized(make()), randomized(make(noise_scale=1000.0))
    x, cond = normal(1, 4, 8, 8), conditioning(1, 6, 3)
    with torch.no_grad():
        torch.testing.assert_close(scaled(x, torch.tensor([0.25]), cond), plain(x, torch.tensor([250.0]), cond))


def gradients(network: PatchTransformer) -> dict[str, Tensor]:
    network(normal(2, 4, 8, 8), torch.tensor([0.1, 0.9]), conditioning(2, 6, 3)).square().mean().backward()
    return {name: p.grad for name, p in network.named_parameters()}


@both
def test_checkpointing_runs_each_block_again_for_the_same_gradients(make: Make):
    runs = []
    plain, frugal = randomized(make()), randomized(make(checkpointing=True))
    for block in frugal.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(gradients(frugal), gradients(plain))
    assert len(runs) == 2 * len(frugal.blocks)


@pytest.mark.parametrize(
    ("make", "changes"),
    [(dit, {"rope": True, "qk_norm": True, "swiglu": True}), (mmdit, {"qk_norm": True, "dual_blocks": 1})],
)
@pytest.mark.parametrize("frugal", [False, True])
def test_compiles_without_graph_breaks(make: Make, changes: dict[str, Any], frugal: bool):
    network = randomized(make(checkpointing=frugal, **changes))
    expected = gradients(network)
    network.zero_grad()
    torch._dynamo.reset()
    network.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(gradients(network), expected, rtol=1e-4, atol=1e-5)


@both
def test_arguments_and_inputs_that_do_not_fit_are_refused(make: Make):
    name = make.__name__
    for width, heads in [(16, 3), (6, 1)]:
        with pytest.raises(UserError, match=rf"{name}: width {width} .* {heads} heads, or by 4"):
            make(width=width, heads=heads)
    network, cond = make(), conditioning(1, 6, 3)
    with pytest.raises(UserError, match=f"{name}: the input has 5 channels, the network takes 4"):
        network(normal(1, 5, 8, 8), torch.zeros(1), cond)
    with pytest.raises(UserError, match=f"{name}: the input is 7x8; both sides must be multiples of 2"):
        network(normal(1, 4, 7, 8), torch.zeros(1), cond)
    with pytest.raises(
        UserError, match=rf"{name}: cond.vector has 0 features, the network takes 3 \(vector_channels\)"
    ):
        network(normal(1, 4, 8, 8), torch.zeros(1), conditioning(1, 6))
    with pytest.raises(
        UserError, match=rf"{name}: cond.tokens has 5 features, the network takes 6 \(context_channels\)"
    ):
        network(normal(1, 4, 8, 8), torch.zeros(1), conditioning(1, 5, 3))
