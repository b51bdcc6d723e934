"""Arguments of our networks out of diffusers' configs or out of a file's shapes, and those configs back out of arguments."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ldm.errors import UserError

Arguments = dict[str, Any]  # of a constructor
Config = dict[str, Any]  # diffusers' config.json
State = dict[str, Tensor]

# what our networks do not vary; diffusers' default wherever a config.json does not say it
_UNET: Config = {
    "act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "dropout": 0.0,
    "time_embedding_type": "positional", "attention_type": "default", "conv_in_kernel": 3, "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0, "addition_embed_type_num_heads": 64,
}  # fmt: skip
_UNET_DEFAULTS: Config = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "transformer_layers_per_block": 1, "norm_num_groups": 32,
    "only_cross_attention": False, "use_linear_projection": False, "attention_head_dim": 8, "cross_attention_dim": 1280,
    "resnet_time_scale_shift": "default",
}  # fmt: skip
_PER_LEVEL = ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention", "cross_attention_dim",
              "layers_per_block")  # fmt: skip
_UNET_FREE = ("sample_size", "upcast_attention", "addition_time_embed_dim")  # sizes and precisions, not structure
_VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_VAE_DEFAULTS: Config = {
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "latent_channels": 4,
    "mid_block_add_attention": True,
}
_VAE_FREE = ("sample_size", "force_upcast", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


def unet_arguments(config: Config) -> Arguments:
    """UNet's arguments. Raises UserError naming the first key whose value our U-Net cannot have."""
    given = _UNET_DEFAULTS | config
    widths, attends = given["block_out_channels"], [kind.startswith("Cross") for kind in given["down_block_types"]]
    heads, depths, crossed = (_each(given[key], len(widths)) for key in _PER_LEVEL[:3])
    same = len(set(heads)) == 1
    arguments = {
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": _each(given["layers_per_block"], 1)[0],
        "depths": [depth if attend else 0 for depth, attend in zip(depths, attends, strict=True)],
        "middle_depth": depths[-1],
        "context_channels": _each(given["cross_attention_dim"], 1)[0],
        "heads": heads[0] if same else None,
        "head_dim": None if same else widths[0] // heads[0],
        "linear": given["use_linear_projection"],
        "vector_channels": given.get("projection_class_embeddings_input_dim") or 0,
        "vector_levels": given.get("num_class_embeds") or 0,
        "self_attention": None if not any(crossed) else [not each for each in crossed],
        "groups": given["norm_num_groups"],
        "scale_shift": given["resnet_time_scale_shift"] == "scale_shift",
    }
    relevant = [attend or level == len(widths) - 1 for level, attend in enumerate(attends)]
    _understood("unet", config, unet_config(arguments), _UNET_FREE, relevant)
    return arguments


def unet_config(arguments: Arguments) -> Config:
    """UNet2DConditionModel's config. Raises UserError naming the argument that it has no room for."""
    given: Config = {
        "vector_channels": 0,
        "vector_levels": 0,
        "groups": 32,
        "heads": None,
        "head_dim": None,
    } | arguments
    widths = [multiplier * given["channels"] for multiplier in given["multipliers"]]
    depths, middle = list(given["depths"]), given["middle_depth"]
    plain = {"coordinates": False, "noise_scale": 1.0}
    wrong = [name for name, value in plain.items() if given.get(name, value) != value]
    wrong += ["middle_depth"] if middle == 0 or depths[-1] not in (0, middle) else []
    if wrong:
        raise UserError(f"model.backbone.{wrong[0]}={given[wrong[0]]}: diffusers' U-Net cannot express it")
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    crossed = [not own for own in given.get("self_attention") or []]
    text_time = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": given["vector_channels"]}
    return _UNET | {
        "_class_name": "UNet2DConditionModel",
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": given["blocks"],
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), middle],
        "cross_attention_dim": given["context_channels"],
        "attention_head_dim": given["heads"] or [width // given["head_dim"] for width in widths],
        "use_linear_projection": given.get("linear", False),
        "only_cross_attention": crossed or False,
        "norm_num_groups": given["groups"],
        "resnet_time_scale_shift": "scale_shift" if given.get("scale_shift") else "default",
        "num_class_embeds": given["vector_levels"] or None,
        **(text_time if given["vector_channels"] else {}),
    }


def autoencoder_arguments(config: Config) -> Arguments:
    """AutoencoderKL's arguments. Raises UserError naming the first key whose value ours cannot have."""
    given = _VAE_DEFAULTS | config
    widths = given["block_out_channels"]
    arguments = {
        "latent_channels": given["latent_channels"],
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": given["layers_per_block"],
        "attention": [kind.startswith("Attn") for kind in given["down_block_types"]],
        "middle_attention": given["mid_block_add_attention"],
        "groups": given["norm_num_groups"],
    }
    _understood("vae", config, autoencoder_config(arguments), _VAE_FREE)
    return arguments


def autoencoder_config(arguments: Arguments) -> Config:
    """diffusers' AutoencoderKL's config, without its scaling factor."""
    given: Config = {"blocks": 2, "attention": None, "middle_attention": True, "groups": 32} | arguments
    kinds = ["Attn" if each else "" for each in given["attention"] or [False] * len(given["multipliers"])]
    return _VAE | {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [multiplier * given["channels"] for multiplier in given["multipliers"]],
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "layers_per_block": given["blocks"],
        "latent_channels": given["latent_channels"],
        "norm_num_groups": given["groups"],
        "mid_block_add_attention": given["middle_attention"],
    }


def _each(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * levels


def _understood(part: str, theirs: Config, ours: Config, free: Sequence[str], relevant: Sequence[bool] = ()) -> None:
    """Refuses a config that says more than our arguments do. relevant: per level, whether it has transformers."""
    for key, value in theirs.items():
        if key.startswith("_") or key in free:
            continue
        expected = ours.get(key)
        sides = [[v for v, used in zip(_each(side, len(relevant)), relevant, strict=True) if used]
                 if key in _PER_LEVEL else side for side in (value, expected)]  # fmt: skip
        if sides[0] != sides[1] and (value or expected):
            raise UserError(
                f"{part}/config.json: {key}={value} has no counterpart here (it would have to be {expected})"
            )


def unet_arguments_of(state: State) -> Arguments:
    """UNet's arguments out of names (ours) and shapes, in the layouts of SD v1 (8 heads) or SD v2 and SDXL (of width 64).

    Raises KeyError or IndexError where a name is missing.
    """
    levels: list[list[str]] = [[]]
    for i in range(1, _count(state, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in state:
            levels.append([])
        else:
            levels[-1].append(f"input_blocks.{i}")
    channels, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    widths = [state[f"{level[0]}.0.out_layers.3.weight"].shape[0] for level in levels]
    middle = "middle_block.1"
    linear = state[f"{middle}.proj_in.weight"].dim() == 2
    own = [_attends_to_itself(state, f"{level[0]}.1.transformer_blocks.0.attn1") for level in levels]
    label = state.get("label_emb.weight")
    return {
        "in_channels": in_channels,
        "out_channels": state["out.2.weight"].shape[0],
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": len(levels[0]),
        "depths": [_count(state, f"{level[0]}.1.transformer_blocks.") for level in levels],
        "middle_depth": _count(state, f"{middle}.transformer_blocks."),
        "context_channels": state[f"{middle}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "heads": None if linear else 8,
        "head_dim": 64 if linear else None,
        "linear": linear,
        "vector_channels": state["label_emb.0.weight"].shape[1] if "label_emb.0.weight" in state else 0,
        "vector_levels": 0 if label is None else label.shape[0],
        "self_attention": None if all(own) else own,
        "groups": 32,
        "scale_shift": state["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1],
    }


def autoencoder_arguments_of(state: State) -> Arguments:
    """AutoencoderKL's arguments out of names (ours) and shapes. Raises KeyError where a name is missing."""
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = [f"encoder.down.{i}" for i in range(_count(state, "encoder.down."))]
    return {
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "channels": channels,
        "multipliers": [state[f"{level}.block.0.conv2.weight"].shape[0] // channels for level in levels],
        "blocks": _count(state, "encoder.down.0.block."),
        "attention": [_count(state, f"{level}.attn.") > 0 for level in levels],
        "middle_attention": "encoder.mid.attn_1.q.weight" in state,
        "groups": 32,
    }


def text_config_of(state: State, activation: str) -> Config:
    """CLIPTextConfig out of transformers' names and shapes; heads are of width 64, as in every published CLIP."""
    vocabulary, width = state["embeddings.token_embedding.weight"].shape
    projection = state.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(state, "encoder.layers."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": state["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": activation,
        "projection_dim": width if projection is None else projection.shape[0],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _count(state: State, prefix: str) -> int:
    """How many numbered children a module has."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _attends_to_itself(state: State, attention: str) -> bool:
    key, query = (state.get(f"{attention}.to_{name}.weight") for name in "kq")
    return key is None or query is None or key.shape[1] == query.shape[1]
