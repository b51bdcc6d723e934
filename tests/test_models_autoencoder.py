import re

import pytest
import torch
from omegaconf import OmegaConf
from test_config import composed
from tiny import ROOT, autoencoder
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm import config
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, Posterior


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_kl_f8_has_stable_diffusion_s_parameter_count():
    with torch.device("meta"):
        network = config.build(OmegaConf.load(ROOT / "configs/model/autoencoder/kl_f8.yaml"))
    assert sum(p.numel() for p in network.parameters()) == 83_653_863
    assert network.factor == 8
    assert network.latent_shape(256) == (4, 32, 32)


@pytest.mark.parametrize(
    ("name", "widths", "attention", "z"),
    [
        ("kl_f4", (128, 256, 512), (), 3),
        ("kl_f8_z16", (128, 256, 512, 512), (), 16),
        ("kl_f16", (128, 128, 256, 256, 512), (4,), 16),
        ("kl_f32", (128, 128, 256, 256, 512, 512), (4, 5), 64),
    ],
)
def test_the_zoo_s_parameter_counts_equal_diffusers_of_the_same_structure(
    name: str, widths: tuple[int, ...], attention: tuple[int, ...], z: int
):
    from diffusers import AutoencoderKL as Peer

    kinds = ["Attn" * (i in attention) for i in range(len(widths))]
    data = ["name=x", "trainer.max_steps=1", "data.shards=a", "data.val_shards=b", "data.side=32", "data.batch_size=4"]
    cfg = composed("train", "model=autoencoder", f"model/autoencoder={name}", *data)
    with torch.device("meta"):
        network = config.build(cfg.model.autoencoder)
        peer = Peer(
            down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds], block_out_channels=widths,
            up_block_types=[f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]], layers_per_block=2, latent_channels=z,
        )  # fmt: skip
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in peer.parameters())
    assert network.factor == 2 ** (len(widths) - 1)


def test_checkpointing_gives_equal_gradients():
    images = normal(1, 3, 8, 8).clamp(-1, 1)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = AutoencoderKL(2, 4, [1, 2], blocks=1, groups=2, checkpointing=checkpointing)
        network.decode(network.encode(images).mean).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def our_key(key: str, levels: int) -> str:
    """diffusers' name of a weight -> CompVis'."""
    key = key.replace("down_blocks.", "down.").replace("mid_block.attentions.0.", "mid.attn_1.")
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)  # ours counts from the finest
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"(down|up)samplers\.0", r"\1sample", key).replace("resnets", "block")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    return re.sub(r"to_([qkv])\.", r"\1.", key).replace("group_norm", "norm").replace("to_out.0", "proj_out")


def test_equals_diffusers():
    from diffusers import AutoencoderKL as Peer

    torch.manual_seed(0)
    peer = Peer(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=(16, 32, 32), layers_per_block=2,
        latent_channels=4, norm_num_groups=8,
    ).eval()  # fmt: skip
    network = AutoencoderKL(4, 16, [1, 2, 2], blocks=2, groups=8)
    shapes = {
        key: value.shape for key, value in network.state_dict().items()
    }  # 1x1 convolutions where theirs is linear
    weights = {our_key(key, 3): value for key, value in peer.state_dict().items()}
    network.load_state_dict({key: value.view(shapes[key]) for key, value in weights.items()})
    images, z = normal(2, 3, 32, 16).clamp(-1, 1), normal(2, 4, 8, 4, seed=1)
    with torch.no_grad():
        posterior, expected = network.encode(images), peer.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.decode(z), peer.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_posterior_is_a_gaussian():
    moments = normal(3, 4, 2, 2)
    posterior, noise = Posterior.of(moments), normal(3, 2, 2, 2, seed=1)
    gaussian = Normal(moments[:, :2], (moments[:, 2:] / 2).exp())
    torch.testing.assert_close(posterior.sample(noise), gaussian.mean + gaussian.stddev * noise)
    expected = kl_divergence(gaussian, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)
    assert Posterior.of(torch.zeros(1, 4, 2, 2)).kl() == 0


def test_posterior_is_float32_with_a_bounded_log_variance():
    posterior = Posterior.of(torch.tensor([0.0, 1e4, -1e4]).view(3, 1, 1, 1).expand(3, 2, 1, 1).bfloat16())
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert posterior.logvar.flatten().tolist() == [0, 20, -30]


def test_shapes_without_middle_attention_and_with_attention_at_a_level():
    network = AutoencoderKL(3, 8, [1, 2, 2], 1, attention=[False, True, False], middle_attention=False, groups=4)
    posterior = network.encode(normal(1, 3, 8, 16))
    assert posterior.mean.shape == posterior.logvar.shape == (1, 3, 2, 4)
    assert network.decode(posterior.mean).shape == (1, 3, 8, 16)
    names = {name.split(".attn")[0] for name, _ in network.named_parameters() if ".attn" in name}
    assert names == {"encoder.down.1", "decoder.up.1"}


def test_arguments_and_images_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="1 attention flags for 2 multipliers"):
        AutoencoderKL(4, 8, [1, 2], attention=[True], groups=4)
    with pytest.raises(UserError, match="8 channels do not divide into 32 groups"):
        AutoencoderKL(4, 8, [1, 2])
    with pytest.raises(UserError, match=r"3x7x8; .*multiples of 2: change data.side"):
        autoencoder().encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(UserError, match="the images hold NaN or infinity"):
        autoencoder().encode(torch.full((1, 3, 8, 8), torch.nan))
    with pytest.raises(UserError, match="1x8x8; expected 3 channels"):
        autoencoder().encode(torch.zeros(1, 1, 8, 8))
