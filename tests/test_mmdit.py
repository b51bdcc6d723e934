import re
from typing import Any

import pytest
import torch
from test_config import composed
from test_configs import NAMED
from test_transformer import mmdit
from test_unet import conditioning, normal
from tiny import randomized
from torch import Tensor, nn

from ldm import config
from ldm.errors import UserError
from ldm.models.mmdit import MMDiT

TIME = "time_text_embed.timestep_embedder"
TEXT = "time_text_embed.text_embedder"
ENDS = {"pos_embed": "pos_embed", "pos_embed.proj": "patch_embed", f"{TIME}.linear_1": "time_embed.0",
        f"{TIME}.linear_2": "time_embed.2", f"{TEXT}.linear_1": "label_emb.0", f"{TEXT}.linear_2": "label_emb.2",
        "context_embedder": "context_embed", "norm_out.linear": "modulation", "proj_out": "out"}  # fmt: skip
INNER = {"norm1.linear": "image.modulation", "norm1_context.linear": "text.modulation", "ff.net.0.proj": "image.ff.0",
         "ff.net.2": "image.ff.2", "ff_context.net.0.proj": "text.ff.0", "ff_context.net.2": "text.ff.2",
         "attn.to_add_out": "text.attn.to_out.0"}  # fmt: skip


def our_key(key: str) -> str:
    """diffusers' name of a weight of SD3 -> ours."""
    if key == "pos_embed.pos_embed":
        return "pos_embed"
    stem, _, leaf = key.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{leaf}"
    number, part = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", stem).groups()
    text = re.fullmatch(r"attn\.(?:add_([qkv])_proj|norm_added_([qk]))", part)
    if text is not None:
        part = f"text.attn.to_{text[1]}" if text[1] else f"text.attn.norm_{text[2]}"
    return f"blocks.{number}.{INNER.get(part, part if part.startswith('text.') else f'image.{part}')}.{leaf}"


def weights(peer: nn.Module, depth: int) -> dict[str, Tensor]:
    """diffusers keeps scale before shift where there is nothing else; SD3's own files, and we, shift before scale."""
    ours = {our_key(key): value for key, value in peer.state_dict().items()}
    for stem in ("modulation", f"blocks.{depth - 1}.text.modulation"):
        for leaf in ("weight", "bias"):
            ours[f"{stem}.{leaf}"] = torch.cat(ours[f"{stem}.{leaf}"].chunk(2)[::-1])
    return ours


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SD3": ({}, {}),
    "qk-norm": ({"qk_norm": True}, {"qk_norm": "rms_norm"}),
    "SD3.5-medium": ({"qk_norm": True, "dual_blocks": 2}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_diffusers(name: str):
    from diffusers import SD3Transformer2DModel

    ours, theirs = VARIANTS[name]
    peer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=3,
        joint_attention_dim=10, caption_projection_dim=24, pooled_projection_dim=7, out_channels=6,
        pos_embed_max_size=12, **theirs,
    )  # fmt: skip
    peer = randomized(peer).eval()
    network = MMDiT(4, 6, 24, 3, 3, side=12, base=8, context_channels=10, vector_channels=7, noise_scale=1000.0, **ours)
    torch.testing.assert_close(network.pos_embed, peer.pos_embed.pos_embed)
    network.load_state_dict(weights(peer, 3))

    t, cond = torch.tensor([0.125, 0.75]), conditioning(2, 10, 7)
    with torch.no_grad():
        for x in (normal(2, 4, 16, 16), normal(2, 4, 6, 24)):
            expected = peer(x, cond.tokens, cond.vector, 1000 * t).sample
            assert expected.std() > 0.1
            torch.testing.assert_close(network(x, t, cond), expected, rtol=1e-4, atol=1e-4)


COUNTS = {"mmdit_sd3_medium": ({"pos_embed_max_size": 192}, 2_028_328_000),
          "mmdit_sd35_medium": ({"pos_embed_max_size": 384, "qk_norm": "rms_norm",
                                 "dual_attention_layers": tuple(range(13))}, 2_243_171_520)}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str):
    """The same names and shapes as in diffusers, with the published settings."""
    from diffusers import SD3Transformer2DModel

    theirs, count = COUNTS[name]
    cfg = composed("train", "model=latent_diffusion", f"model/backbone={name}", *NAMED)
    with torch.device("meta"):
        network = config.build(cfg.model.backbone)
        peer = SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, **theirs)
    expected = {key: value.shape for key, value in weights(peer, 24).items()}
    assert {key: value.shape for key, value in network.state_dict().items()} == expected
    assert sum(p.numel() for p in network.parameters()) == count


def test_an_input_takes_the_center_of_the_positions():
    network = mmdit()
    table = network.pos_embed.view(8, 8, 16)
    torch.testing.assert_close(network._positions(4, 2), table[2:6, 3:5].reshape(1, 8, 16))
    with pytest.raises(UserError, match=r"the input is 3x9 patches, the table of positions has 8 \(side\)"):
        network(normal(1, 4, 6, 18), torch.zeros(1), conditioning(1, 6, 3))


def test_the_last_block_keeps_no_weights_that_nothing_reads():
    network = randomized(mmdit(dual_blocks=1, qk_norm=True))
    network(normal(1, 4, 8, 8), torch.zeros(1), conditioning(1, 6, 3)).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
