from typing import Any

import pytest
import torch
from test_config import composed
from tiny import randomized
from torch import Tensor

from ldm import config
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.interop.keys import unet_keys
from ldm.models.layers import TransformerBlock, sinusoidal
from ldm.models.unet import ResBlock, SpatialTransformer, UNet

COUNTS = {
    "unet_sd1": 859_520_964,
    "unet_sd2": 865_910_724,
    "unet_sdxl": 2_567_463_684,
    # of diffusers' U-Net with the published config.json
    "unet_sd2_inpaint": 865_925_124,
    "unet_sd2_depth": 865_913_604,
    "unet_sdxl_refiner": 2_259_526_660,
    "unet_x4_upscaler": 473_398_020,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str):
    backbone = composed("train", f"model/backbone={name}", "name=x").model.backbone
    with torch.device("meta"):
        network = config.build(backbone)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(rows: int, width: int, vector: int = 0, length: int = 5) -> Conditioning:
    mask = torch.ones(rows, length, dtype=torch.bool)
    return Conditioning(normal(rows, length, width, seed=1), mask, normal(rows, vector, seed=2))


# ours, then what diffusers calls the same; its `attention_head_dim` is the number of heads
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SD1": (
        {"multipliers": [1, 2, 2], "depths": [1, 1, 0], "middle_depth": 1, "heads": 4},
        {"attention_head_dim": 4},
    ),
    "SD2": (
        {"multipliers": [1, 2, 2], "depths": [1, 1, 0], "middle_depth": 1, "head_dim": 8, "linear": True},
        {"attention_head_dim": (4, 8, 8), "use_linear_projection": True},
    ),
    "SDXL": (
        {"multipliers": [1, 2, 2], "depths": [0, 2, 3], "middle_depth": 3, "head_dim": 8, "linear": True,
         "vector_channels": 12 + 6 * 8},
        {"attention_head_dim": (4, 8, 8), "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 3),
         "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
         "projection_class_embeddings_input_dim": 12 + 6 * 8},
    ),
    "ADM": (
        {"multipliers": [1, 2, 2], "depths": [1, 1, 0], "middle_depth": 1, "heads": 4, "scale_shift": True},
        {"attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift"},
    ),
    "x4": (
        {"multipliers": [1, 2, 2], "depths": [0, 1, 1], "middle_depth": 1, "heads": 4, "linear": True,
         "vector_levels": 10, "self_attention": [False, False, True]},
        {"attention_head_dim": 4, "use_linear_projection": True, "num_class_embeds": 10,
         "only_cross_attention": [True, True, False]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name: str):
    from diffusers import UNet2DConditionModel

    ours, theirs = VARIANTS[name]
    attention = [depth > 0 for depth in ours["depths"]]
    torch.manual_seed(0)
    peer = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 64, 64), layers_per_block=2, cross_attention_dim=24,
        norm_num_groups=8, down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)], **theirs,
    ).eval()  # fmt: skip
    network = UNet(4, 4, 32, blocks=2, context_channels=24, groups=8, **ours)
    theirs, names = peer.state_dict(), unet_keys(network)
    assert set(names.values()) == theirs.keys()
    network.load_state_dict({ours: theirs[name] for ours, name in names.items()})

    x, steps, cond = normal(2, 4, 16, 8), torch.tensor([3.0, 801.0]), conditioning(2, 24)
    cond.mask[1, 3:] = False
    extra, labels = {}, None
    if name == "x4":
        labels, cond = (
            torch.tensor([3, 7]),
            cond._replace(vector=torch.tensor([[3.0], [7.0]]), mask=torch.ones(2, 5).bool()),
        )
    if name == "SDXL":
        extra = {"text_embeds": normal(2, 12, seed=3), "time_ids": torch.arange(12.0).view(2, 6) * 64}
        sizes = sinusoidal(extra["time_ids"].flatten(), 8).view(2, 48)
        cond = cond._replace(vector=torch.cat([extra["text_embeds"], sizes], dim=1))
    with torch.no_grad():
        expected = peer(x, steps, cond.tokens, labels, encoder_attention_mask=cond.mask, added_cond_kwargs=extra).sample
        torch.testing.assert_close(network(x, steps, cond), expected, rtol=1e-4, atol=1e-4)


def tiny_unet(**changes: Any) -> UNet:
    arguments = {"in_channels": 4, "out_channels": 3, "channels": 8, "multipliers": [1, 2], "blocks": 1,
                 "depths": [0, 1], "middle_depth": 1, "context_channels": 6, "heads": 2, "groups": 4}  # fmt: skip
    return UNet(**(arguments | changes))


def gradients(network: UNet) -> list[Tensor]:
    network.zero_grad()
    network(normal(2, 4, 8, 8), torch.tensor([3.0, 500.0]), conditioning(2, 6, 3)).square().sum().backward()
    return [p.grad for p in network.parameters()]


def test_checkpointing_gives_the_same_gradients_from_fewer_activations():
    kept, both = [], []
    for checkpointing in (False, True):
        network = randomized(tiny_unet(vector_channels=3, checkpointing=checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t.numel()) or t, lambda t: t):
            kept.append([])
            both.append(gradients(network))
    for plain, again in zip(*both, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)
    assert sum(kept[1]) < 0.5 * sum(kept[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_graph_breaks(checkpointing: bool):
    torch.compiler.reset()
    network = randomized(tiny_unet(vector_channels=3, coordinates=True, checkpointing=checkpointing, linear=True))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for side in (8, 12):
        x, steps, cond = normal(2, 4, side, 8), torch.tensor([3.0, 500.0]), conditioning(2, 6, 3)
        torch.testing.assert_close(compiled(x, steps, cond), network(x, steps, cond))
    compiled(x, steps, cond).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_channels_last_is_the_same_network():
    network, x, steps, cond = (
        randomized(tiny_unet()),
        normal(2, 4, 8, 12),
        torch.tensor([3.0, 500.0]),
        conditioning(2, 6),
    )
    expected = network(x, steps, cond)
    seen = []
    network = network.to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, SpatialTransformer):
            module.register_forward_hook(
                lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    output = network(x.to(memory_format=torch.channels_last), steps, cond)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert len(seen) == 4
    assert all(seen)


@pytest.mark.parametrize("levels", [{}, {"self_attention": [True, False]}], ids=["SD", "x4 upscaler"])
def test_keys_and_values_of_the_text_are_computed_once(levels: dict[str, Any]):
    network, x, steps = randomized(tiny_unet(**levels)), normal(4, 4, 8, 8), torch.tensor([3.0, 500.0, 7.0, 900.0])
    one, other = conditioning(2, 6), conditioning(2, 6).map(lambda part: part.flip(0))
    expected = network(x, steps, one.cat(other))
    calls: list[int] = []
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    together = network.prepared(one).cat(network.prepared(other))
    blocks = len(calls) // 2
    assert blocks == 4
    for _ in range(3):
        torch.testing.assert_close(network(x, steps, together), expected)
    assert len(calls) == 2 * blocks
    text_free = tiny_unet(context_channels=0)
    assert text_free.prepared(one) is one


def test_a_fresh_network_returns_zero_and_its_branches_are_identities():
    network, x = tiny_unet(), normal(2, 4, 8, 8)
    assert network(x, torch.zeros(2), conditioning(2, 6)).shape == (2, 3, 8, 8)
    assert not network(x, torch.zeros(2), conditioning(2, 6)).any()
    h = normal(2, 8, 4, 4)
    for scale_shift in (False, True):
        torch.testing.assert_close(ResBlock(8, 8, 32, 4, scale_shift)(h, normal(2, 32)), h)
    torch.testing.assert_close(SpatialTransformer(8, 2, 4, 1, 6, 4, False)(h, conditioning(2, 6)), h)


def test_coordinates_tell_a_network_where_it_is():
    network = tiny_unet(coordinates=True)
    seen = []
    network.input_blocks[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = normal(2, 4, 4, 6)
    network(x, torch.zeros(2), conditioning(2, 6))
    torch.testing.assert_close(seen[0][:, :4], x)
    torch.testing.assert_close(seen[0][1, 4], torch.linspace(-1, 1, 6).expand(4, 6))
    torch.testing.assert_close(seen[0][1, 5], torch.linspace(-1, 1, 4)[:, None].expand(4, 6))


def test_padding_tokens_do_not_matter():
    network, cond = randomized(tiny_unet()), conditioning(2, 6)
    cond.mask[:, 3:] = False
    other = cond._replace(tokens=torch.where(cond.mask[..., None], cond.tokens, 7.0))
    shorter = Conditioning(cond.tokens[:, :3], cond.mask[:, :3], cond.vector)
    x, steps = normal(2, 4, 8, 8), torch.tensor([0.5, 20.0])
    with torch.no_grad():
        output = network(x, steps, cond)
        assert output.std() > 0.01
        torch.testing.assert_close(network(x, steps, other), output)
        torch.testing.assert_close(network(x, steps, shorter), output)


@pytest.mark.parametrize("part", ["tokens", "vector", "c_noise"])
def test_every_input_matters(part: str):
    network, cond = randomized(tiny_unet(vector_channels=3)), conditioning(1, 6, vector=3)
    x, steps = normal(1, 4, 8, 8), torch.tensor([0.5])
    changed = cond if part == "c_noise" else cond._replace(**{part: getattr(cond, part) + 1})
    moved = steps + 1 if part == "c_noise" else steps
    with torch.no_grad():
        assert (network(x, steps, cond) - network(x, moved, changed)).abs().max() > 1e-3


def test_noise_scale_multiplies_the_noise_label():
    plain, scaled = randomized(tiny_unet()), randomized(tiny_unet(noise_scale=1000.0))
    x, cond = normal(1, 4, 8, 8), conditioning(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(scaled(x, torch.tensor([0.25]), cond), plain(x, torch.tensor([250.0]), cond))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [0]}, "1 depths, 2 self_attention for 2 multipliers"),
        ({"self_attention": [True]}, "2 depths, 1 self_attention for 2 multipliers"),
        ({"vector_channels": 3, "vector_levels": 4}, "vector_levels=4; give one of the two"),
        ({"heads": None}, "exactly one of the two"),
        ({"head_dim": 4}, "exactly one of the two"),
        ({"groups": 3}, "8 channels do not divide into 3 groups"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        tiny_unet(**changes)


def test_inputs_that_do_not_fit_are_refused():
    network, cond = tiny_unet(vector_channels=3), conditioning(1, 6, vector=3)
    with pytest.raises(UserError, match="5 channels, the network takes 4"):
        network(normal(1, 5, 8, 8), torch.zeros(1), cond)
    with pytest.raises(UserError, match="7x8; both sides must be multiples of 2"):
        network(normal(1, 4, 7, 8), torch.zeros(1), cond)
    with pytest.raises(UserError, match=r"cond.vector has 0 features, the network takes 3"):
        network(normal(1, 4, 8, 8), torch.zeros(1), conditioning(1, 6))
    with pytest.raises(UserError, match=r"cond.vector has 3 features, the network takes 1 \(.* 1 for vector_levels"):
        tiny_unet(vector_levels=5)(normal(1, 4, 8, 8), torch.zeros(1), cond)


@torch.no_grad()
def test_without_a_context_the_transformers_attend_to_the_grid_alone():
    """A model of classes has no tokens: (B, 0, 0)."""
    network = randomized(UNet(2, 2, 8, [1, 2], blocks=1, depths=[0, 1], middle_depth=1, context_channels=0, heads=2,
                              vector_channels=4, groups=4))  # fmt: skip
    assert not any("attn2" in name for name in network.state_dict())
    cond = Conditioning(torch.zeros(2, 0, 0), torch.zeros(2, 0, dtype=torch.bool), normal(2, 4))
    out = network(normal(2, 2, 8, 8), torch.zeros(2), cond)
    assert out.isfinite().all()
    assert torch.equal(
        out, network(normal(2, 2, 8, 8), torch.zeros(2), conditioning(2, 8)._replace(vector=cond.vector))
    )
    assert not torch.equal(out, network(normal(2, 2, 8, 8), torch.zeros(2), cond._replace(vector=-cond.vector)))


@pytest.mark.parametrize("name", [*VARIANTS, "no text"])
def test_conditions_of_one_x_share_what_comes_before_them(name: str):
    """One network call for guidance: k rows of cond for each of x."""
    sizes = VARIANTS[name][0] if name in VARIANTS else {**VARIANTS["SD1"][0]}
    width = 16 if name in VARIANTS else 0
    network = randomized(UNet(4, 4, 32, blocks=1, context_channels=width, groups=8, **sizes))
    cond = conditioning(6, width, network.vector_width)
    if "vector_levels" in sizes:
        cond = cond._replace(vector=torch.arange(6)[:, None])
    x, c_noise = normal(2, 4, 8, 8), torch.tensor([3.0, 800.0])
    rows: list[int] = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        shared = network(x, c_noise, network.prepared(cond))
        seen, rows[:] = rows[:], []
        whole = network(x.repeat(3, 1, 1, 1), c_noise.repeat(3), network.prepared(cond))
    torch.testing.assert_close(shared, whole, atol=1e-5, rtol=1e-5)
    assert sum(seen) < sum(rows)
    assert (seen.count(2) > 2) == (network.vector_width == 0)  # a vector is in every row's embedding from the start
