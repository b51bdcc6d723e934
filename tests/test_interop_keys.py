"""Names, arguments and numbers of U-Nets and autoencoders against diffusers', and of text towers against open_clip's."""

from typing import Any

import pipelines
import pytest
import torch
from test_config import composed
from torch import Tensor, nn

from ldm import config
from ldm.errors import UserError
from ldm.interop import keys, layouts, sources
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet

PUBLISHED = ["unet_sd1", "unet_sd2", "unet_sdxl", "unet_sdxl_refiner", "unet_x4_upscaler", "unet_sd2_inpaint"]
LARGER = {  # three levels, several layers and depths
    "sd1": {"block_out_channels": (32, 64, 64), "layers_per_block": 2, "attention_head_dim": 4, "norm_num_groups": 8},
    "sd2": {"block_out_channels": (32, 64, 96), "layers_per_block": 2, "attention_head_dim": (2, 4, 6), "norm_num_groups": 16},
    "sdxl": {"block_out_channels": (32, 64, 64), "layers_per_block": 2, "attention_head_dim": (2, 4, 4),
             "transformer_layers_per_block": (1, 2, 3)},
}  # fmt: skip
LEVELS = {
    "sd1": ["CrossAttn", "CrossAttn", ""],
    "sd2": ["CrossAttn", "CrossAttn", ""],
    "sdxl": ["", "CrossAttn", "CrossAttn"],
}
VAES: list[dict[str, Any]] = [
    {},
    {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 8,
     "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
    {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], "mid_block_add_attention": False,
     "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]},
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def taken(kind: type[nn.Module], arguments: dict[str, Any], names: Any, peer: nn.Module) -> nn.Module:
    """Our network with the peer's weights; every name of both sides is in the map."""
    network = kind(**arguments)
    map_, state = names(network), peer.state_dict()
    assert map_.keys() == network.state_dict().keys()
    assert set(map_.values()) == state.keys()
    assert len(set(map_.values())) == len(map_)
    network.load_state_dict(sources.fit(network, sources.renamed(network, state, map_), "peer"))
    return network.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_map_of_a_published_network_is_complete_and_its_arguments_are_found(name: str):
    """Both ways: through diffusers' config, and out of names and shapes alone."""
    from diffusers import UNet2DConditionModel

    backbone = config.plain(composed("train", f"model/backbone={name}", "name=x").model.backbone)
    given = {key: value for key, value in backbone.items() if key not in ("_target_", "checkpointing")}
    description = layouts.unet_config(given)
    with torch.device("meta"):
        network, peer = UNet(**given), UNet2DConditionModel.from_config(description)
    names, shapes = keys.unet_keys(network), {key: value.shape for key, value in peer.state_dict().items()}
    assert {names[key]: value.shape for key, value in network.state_dict().items()} == shapes
    described = layouts.unet_arguments(pipelines.config_of(peer))
    assert described == layouts.unet_arguments(description)
    if name != "unet_x4_upscaler":  # its heads are as in v1, its layers linear: single files of it are not read
        assert layouts.unet_arguments_of(network.state_dict()) == described
    assert {key: described[key] for key in given} == given


def test_the_map_of_kl_f8_is_complete():
    from diffusers import AutoencoderKL as Peer

    node = config.plain(composed("train", "model=autoencoder", "model/autoencoder=kl_f8", "name=x").model.autoencoder)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    with torch.device("meta"):
        network, peer = AutoencoderKL(**arguments), Peer.from_config(layouts.autoencoder_config(arguments))
    state = sources.theirs(network.state_dict(), keys.autoencoder_keys(network))
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in peer.state_dict().items()}
    assert sum(p.numel() for p in peer.parameters()) == 83_653_863
    found = layouts.autoencoder_arguments_of(network.state_dict())
    assert {key: found[key] for key in arguments} == arguments


@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_unet_equals_diffusers_both_ways(kind: str, larger: bool):
    from diffusers import UNet2DConditionModel

    changes = LARGER[kind] if larger else {}
    if larger:
        changes = changes | {"down_block_types": [f"{each}DownBlock2D" for each in LEVELS[kind]],
                             "up_block_types": [f"{each}UpBlock2D" for each in reversed(LEVELS[kind])]}  # fmt: skip
    peer = pipelines.unet(kind, **changes)
    network = taken(UNet, layouts.unet_arguments(pipelines.config_of(peer)), keys.unet_keys, peer)
    x, steps, context = normal(2, 4, 16, 8), torch.tensor([3.0, 801.0]), normal(2, 5, peer.config.cross_attention_dim)
    ids = torch.arange(12.0).view(2, 6) * 64
    extra = {"text_embeds": normal(2, 64, seed=3), "time_ids": ids}
    sizes = layouts_sinusoids(ids)
    cond = conditioning(context, torch.cat([extra["text_embeds"], sizes], 1) if kind == "sdxl" else normal(2, 0))
    with torch.no_grad():
        expected = peer(x, steps, context, added_cond_kwargs=extra).sample
        torch.testing.assert_close(network(x, steps, cond), expected, rtol=1e-4, atol=1e-4)
        back = UNet2DConditionModel.from_config(
            layouts.unet_config(layouts.unet_arguments(pipelines.config_of(peer))) | {"addition_time_embed_dim": 256}
        )
        names = keys.unet_keys(network)
        back.load_state_dict({names[key]: value for key, value in network.state_dict().items()})
        assert torch.equal(back.eval()(x, steps, context, added_cond_kwargs=extra).sample, expected)


def layouts_sinusoids(ids: Tensor) -> Tensor:
    from ldm.models.layers import sinusoidal

    return sinusoidal(ids.flatten(), 256).view(len(ids), -1)


def conditioning(tokens: Tensor, vector: Tensor) -> Any:
    from ldm.conditioning import Conditioning

    return Conditioning(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), vector)


@pytest.mark.parametrize("changes", VAES, ids=["kl", "larger", "attention"])
def test_autoencoder_equals_diffusers_both_ways(changes: dict[str, Any]):
    from diffusers import AutoencoderKL as Peer

    peer = pipelines.autoencoder(**changes)
    arguments = layouts.autoencoder_arguments(pipelines.config_of(peer))
    network = taken(AutoencoderKL, arguments, keys.autoencoder_keys, peer)
    assert layouts.autoencoder_arguments_of(network.state_dict()) | {"groups": arguments["groups"]} == arguments
    images = normal(2, 3, 32, 16).clamp(-1, 1)
    back = Peer.from_config(layouts.autoencoder_config(arguments))
    back.load_state_dict(sources.theirs(network.state_dict(), keys.autoencoder_keys(network)))
    with torch.no_grad():
        for other in (peer, back.eval()):
            posterior, expected = network.encode(images), other.encode(images).latent_dist
            torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-4, atol=1e-4)
            z = posterior.mean
            torch.testing.assert_close(network.decode(z), other.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_the_text_tower_of_open_clip_in_transformers_names_is_the_same_network():
    from open_clip.model import CLIPTextCfg, _build_text_tower
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tower = pipelines.seeded(_build_text_tower(48, CLIPTextCfg(width=64, heads=1, layers=3)), 5)
    state = keys.from_open_clip(tower.state_dict())
    back = keys.to_open_clip(state)
    assert back.keys() == tower.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in tower.state_dict().items())
    model = CLIPTextModelWithProjection(CLIPTextConfig(**layouts.text_config_of(state, "gelu"))).eval()
    model.load_state_dict({key if "projection" in key else f"text_model.{key}": value for key, value in state.items()})
    ids = torch.tensor([[49406, 320, 1125, 49407, 0, 0], [49406, 539, 49407, 0, 0, 0]])
    ids = torch.nn.functional.pad(ids, (0, 71))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).text_embeds, tower(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_embedding_type": "fourier"}, "unet/config.json: time_embedding_type=fourier"),
        ({"act_fn": "mish"}, "act_fn=mish has no counterpart"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        (
            {"only_cross_attention": [True, True], "mid_block_only_cross_attention": True},
            "mid_block_only_cross_attention",
        ),
        ({"cross_attention_dim": [8, 16]}, r"cross_attention_dim=\[8, 16\]"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),  # distilled with guidance: it would sample without
    ],
)
def test_a_unet_that_ours_cannot_be_is_refused_by_key(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        layouts.unet_arguments(pipelines.config_of(pipelines.unet("sd1")) | change)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"coordinates": True}, "coordinates"),
        ({"noise_scale": 10.0}, "noise_scale"),
        ({"middle_depth": 0}, "middle_depth"),
    ],
)
def test_a_unet_that_diffusers_cannot_express_is_refused_by_argument(change: dict[str, Any], name: str):
    with pytest.raises(UserError, match=f"model.backbone.{name}={change[name]}: diffusers' U-Net cannot"):
        layouts.unet_config(layouts.unet_arguments(pipelines.config_of(pipelines.unet("sd1"))) | change)
