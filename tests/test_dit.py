import re

import pytest
import torch
from omegaconf import OmegaConf
from test_config import composed
from test_configs import NAMED
from test_transformer import dit
from test_unet import conditioning, normal
from tiny import randomized
from torch import Tensor, nn

from ldm import config
from ldm.errors import UserError
from ldm.models.dit import DiT
from ldm.models.transformer import FREQUENCIES

INNER = {"norm1.linear": "modulation", "ff.net.0.proj": "ff.0", "ff.net.2": "ff.2"}


def our_key(key: str, ends: dict[str, str]) -> str | None:
    """diffusers' name of a weight -> ours; None for the embeddings that it keeps in every block."""
    stem, _, leaf = key.rpartition(".")
    if stem in ends:
        return f"{ends[stem]}.{leaf}"
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", stem)
    if block is None or block[2].startswith("norm1.emb."):
        return None
    return f"blocks.{block[1]}.{INNER.get(block[2], block[2])}.{leaf}"


def renamed(peer: nn.Module, ends: dict[str, str]) -> dict[str, Tensor]:
    names = {key: our_key(key, ends) for key in peer.state_dict()}
    return {names[key]: value for key, value in peer.state_dict().items() if names[key]}


def test_equals_diffusers_dit():
    """By classes: as a one-hot vector whose embedding is a row of the class table."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    peer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=6,
                                 num_layers=3, sample_size=12, num_embeds_ada_norm=5, norm_eps=1e-6)  # fmt: skip
    peer = randomized(peer).eval()
    embedding = peer.transformer_blocks[0].norm1.emb
    embedding.time_proj.downscale_freq_shift = 0  # as in DiT's own code
    for block in peer.transformer_blocks:
        block.norm1.emb = embedding
    emb = "transformer_blocks.0.norm1.emb.timestep_embedder"
    weights = renamed(peer, {"pos_embed.proj": "patch_embed", f"{emb}.linear_1": "time_embed.0", f"{emb}.linear_2":
                             "time_embed.2", "proj_out_1": "modulation", "proj_out_2": "out"})  # fmt: skip
    table = embedding.class_embedder.embedding_table.weight  # (classes + 1, D); SiLU(1) of one feature reaches it
    weights |= {"label_emb.0.weight": torch.eye(16, 6), "label_emb.0.bias": torch.zeros(16),
                "label_emb.2.weight": torch.zeros(16, 16), "label_emb.2.bias": torch.zeros(16)}  # fmt: skip
    weights["label_emb.2.weight"][:, :6] = table.T / nn.functional.silu(torch.ones(()))
    network = DiT(4, 6, 16, 3, 2, vector_channels=6)
    network.load_state_dict(weights)

    x, steps, classes = normal(2, 4, 12, 12), torch.tensor([3.0, 801.0]), torch.tensor([0, 4])
    cond = conditioning(2, 7)._replace(vector=nn.functional.one_hot(classes, 6).float())
    with torch.no_grad():
        expected = peer(x, steps, classes).sample
        assert expected.std() > 0.1
        torch.testing.assert_close(network(x, steps, cond), expected, rtol=1e-4, atol=1e-4)


def test_equals_diffusers_pixart():
    """Cross-attention, its mask, other grids. PixArt's one modulation for all blocks is ours, repeated; its last one has no
    SiLU, so here it is a constant, at one noise level."""
    from diffusers import PixArtTransformer2DModel

    peer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=6, num_layers=3, sample_size=12,
        cross_attention_dim=16, caption_channels=10, interpolation_scale=1,
    )  # fmt: skip
    peer = randomized(peer).eval()
    emb = "adaln_single.emb.timestep_embedder"
    ends = {"pos_embed.proj": "patch_embed", f"{emb}.linear_1": "time_embed.0", f"{emb}.linear_2": "time_embed.2",
            "caption_projection.linear_1": "context_embed.0", "caption_projection.linear_2": "context_embed.2",
            "proj_out": "out"}  # fmt: skip
    weights = renamed(peer, ends)
    shared, steps = peer.adaln_single.linear, torch.tensor([417.0, 417.0])
    for i, block in enumerate(peer.transformer_blocks):
        weights[f"blocks.{i}.modulation.weight"] = shared.weight
        weights[f"blocks.{i}.modulation.bias"] = shared.bias + block.scale_shift_table.flatten()
    with torch.no_grad():
        constant = peer.scale_shift_table + peer.adaln_single.emb(steps[:1], None, None, 1, torch.float32)
    weights |= {"modulation.weight": torch.zeros(32, 16), "modulation.bias": constant.flatten()}
    network = DiT(4, 6, 16, 3, 2, context_channels=10, base=6)
    network.load_state_dict(weights)

    cond = conditioning(2, 10)
    cond.mask[1, 3:] = False
    with torch.no_grad():
        for x in (normal(2, 4, 12, 12), normal(2, 4, 8, 20)):
            expected = peer(x, cond.tokens, steps, encoder_attention_mask=cond.mask).sample
            assert expected.std() > 0.1
            torch.testing.assert_close(network(x, steps, cond), expected, rtol=1e-4, atol=1e-4)


# of the published networks, which take classes, predict variances too, and count their 256 fixed positions
PUBLISHED = {"dit_s_2": 33.0e6, "dit_b_2": 130.5e6, "dit_l_2": 458.1e6, "dit_xl_2": 675_129_632}


def parameters(name: str, *changes: str) -> int:
    cfg = composed("train", "model=latent_diffusion", f"model/backbone={name}", *changes, *NAMED)
    with torch.device("meta"):
        return sum(p.numel() for p in config.build(cfg.model.backbone).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str):
    width = OmegaConf.to_container(composed("train", "model=latent_diffusion", f"model/backbone={name}", *NAMED))
    width = width["model"]["backbone"]["width"]
    ours = parameters(name, "model.backbone.context_channels=0", "model.backbone.out_channels=8")
    count = ours + 1001 * width + 256 * width  # the class table, the positions
    assert count == pytest.approx(PUBLISHED[name], rel=0 if name == "dit_xl_2" else 2e-3)


def test_rope_and_the_gate_take_part():
    x, cond = normal(1, 4, 8, 8), conditioning(1, 6, 3)
    with torch.no_grad():
        outputs = [randomized(dit(rope=rope, sin_cos=fixed))(x, torch.zeros(1), cond)
                   for rope, fixed in [(False, True), (True, True), (True, False), (False, False)]]  # fmt: skip
    for i, output in enumerate(outputs):
        assert all((output - other).abs().max() > 1e-3 for other in outputs[:i])
    assert FREQUENCIES == 256
    assert dit(width=24, swiglu=True).blocks[0].ff[1].in_features == 64


def test_rope_needs_pairs_on_both_axes():
    with pytest.raises(UserError, match=r"rope needs a head width that is a multiple of 4; 12 / 2 heads is 6"):
        dit(width=12, rope=True)


def test_without_text_or_vector_nothing_of_them_is_read():
    network, x = randomized(dit(context_channels=0, vector_channels=0)), normal(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network(x, torch.zeros(1), conditioning(1, 5)),
                                   network(x, torch.zeros(1), conditioning(1, 7, 2)))  # fmt: skip
