"""Names of weights: ours (CompVis') beside diffusers', and open_clip's text transformer beside transformers'.

A map is made by walking a network, so it holds every entry of its state dict, whatever its size: {ours: theirs}.
"""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AttnBlock, AutoencoderKL, Level, ResnetBlock
from ldm.models.layers import Downsample, Upsample
from ldm.models.unet import ResBlock, Stage, UNet

_UNET = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",  # of vector_levels
    "label_emb.0": "add_embedding.linear_1",
    "label_emb.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
Renames = Iterator[tuple[str, str]]  # (our module, theirs)


def unet_keys(network: UNet) -> dict[str, str]:
    """Ours -> diffusers' UNet2DConditionModel."""
    stages = ("input_blocks", "down_blocks", 1), ("output_blocks", "up_blocks", 0)
    renames = dict(_UNET)
    for ours, theirs, first in stages:
        renames |= dict(_stages(getattr(network, ours)[first:], ours, theirs, first))
    renames |= dict(_layers(network.middle_block, "middle_block", "mid_block", 0))
    renames |= {"middle_block.2": "mid_block.resnets.1"} | _inside("middle_block.2", "mid_block.resnets.1", _RESIDUAL)
    return _keys(network, renames)


def _stages(stages: list[Stage], ours: str, theirs: str, first: int) -> Renames:
    """Theirs counts levels, and layers within a level; a change of resolution ends one."""
    level = layer = 0
    for i, stage in enumerate(stages):
        yield from _layers(stage, f"{ours}.{first + i}", f"{theirs}.{level}", layer)
        level, layer = (level + 1, 0) if isinstance(stage[-1], (Downsample, Upsample)) else (level, layer + 1)


def _layers(stage: Stage, ours: str, theirs: str, number: int) -> Renames:
    for k, layer in enumerate(stage):
        if isinstance(layer, ResBlock):
            yield from _inside(f"{ours}.{k}", f"{theirs}.resnets.{number}", _RESIDUAL).items()
        elif isinstance(layer, Downsample):
            yield f"{ours}.{k}.op", f"{theirs}.downsamplers.0.conv"
        elif isinstance(layer, Upsample):
            yield f"{ours}.{k}", f"{theirs}.upsamplers.0"
        else:
            yield f"{ours}.{k}", f"{theirs}.attentions.{number}"


def autoencoder_keys(network: AutoencoderKL) -> dict[str, str]:
    """Ours -> diffusers' AutoencoderKL, whose attention is of linear layers: the same numbers in another shape."""
    renames = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(network.encoder.down)
    for half, part in (("encoder", network.encoder), ("decoder", network.decoder)):
        renames |= {f"{half}.{end}": f"{half}.{end}" for end in ("conv_in", "conv_out")}
        renames[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for i, block in enumerate((part.mid.block_1, part.mid.block_2)):
            renames |= dict(_block(block, f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}"))
        renames |= dict(_block(part.mid.attn_1, f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"))
    for i, (down, up) in enumerate(zip(network.encoder.down, network.decoder.up, strict=True)):
        renames |= dict(_level(down, f"encoder.down.{i}", f"encoder.down_blocks.{i}", "downsample"))
        renames |= dict(
            _level(up, f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}", "upsample")
        )  # coarsest first
    return _keys(network, renames)


def _level(level: Level, ours: str, theirs: str, change: str) -> Renames:
    yield f"{ours}.{change}", f"{theirs}.{change}rs.0"
    for kind, name in (("block", "resnets"), ("attn", "attentions")):
        for j, block in enumerate(getattr(level, kind)):
            yield from _block(block, f"{ours}.{kind}.{j}", f"{theirs}.{name}.{j}")


def _block(block: nn.Module, ours: str, theirs: str) -> Renames:
    yield ours, theirs
    if isinstance(block, ResnetBlock):
        yield f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut"
    if isinstance(block, AttnBlock):
        yield from _inside(ours, theirs, _ATTENTION).items()


def _inside(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


def _keys(network: nn.Module, renames: dict[str, str]) -> dict[str, str]:
    """Every entry of the state dict, renamed by the longest module path that `renames` has."""

    def theirs(path: str) -> str:
        parent, _, leaf = path.rpartition(".")
        return renames[path] if path in renames else f"{theirs(parent)}.{leaf}"

    return {key: theirs(key) for key in network.state_dict()}


# open_clip's text transformer -> transformers' CLIPTextModel, by parts of names
_OPEN_CLIP = {
    "transformer.resblocks.": "encoder.layers.",
    "token_embedding.": "embeddings.token_embedding.",
    "ln_final.": "final_layer_norm.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_WHOLE = {"positional_embedding": "embeddings.position_embedding.weight", "text_projection": "text_projection.weight"}


def _replaced(name: str, parts: dict[str, str]) -> str:
    return reduce(lambda text, pair: text.replace(*pair), parts.items(), name)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names -> transformers': its q, k and v are one matrix, its projection is transposed."""
    out = {}
    for key, value in state.items():
        name = _WHOLE.get(key) or _replaced(key, _OPEN_CLIP)
        if "in_proj_" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("in_proj_", f"{part}_proj.")] = rows.contiguous()
        else:
            out[name] = value.T.contiguous() if key == "text_projection" else value
    return out


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`."""
    parts, whole = ({theirs: ours for ours, theirs in names.items()} for names in (_OPEN_CLIP, _WHOLE))
    out = {}
    for key, value in state.items():
        name = whole.get(key) or _replaced(key, parts)
        if ".q_proj." in name:
            rows = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[name.replace("q_proj.", "in_proj_")] = torch.cat(rows)
        elif not any(part in name for part in (".k_proj.", ".v_proj.")):
            out[name] = value.T.contiguous() if name == "text_projection" else value
    return out
