"""Writes a run as what others load: a diffusers folder, or a single file in CompVis' layout (ComfyUI, A1111, diffusers)."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm import config, fetch
from ldm.diffusion.parameterization import Eps, V
from ldm.diffusion.schedules import Linear, ScaledLinear
from ldm.errors import UserError
from ldm.interop import keys, layouts, sources
from ldm.interop.files import TOKENIZER, write_json, write_text, write_weights
from ldm.interop.layouts import Config, State
from ldm.interop.sources import LAYOUTS, PREDICTIONS, SCHEDULES, Model, Text
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.conditioners import Combined, SizeCrop, TextConditioner, Zeros
from ldm.models.first_stage import FirstStage
from ldm.models.text_pretrained import CLIPText, ConcatText, OpenCLIPText, PretrainedText
from ldm.models.unet import UNet
from ldm.training import checkpointing
from ldm.training.latent_diffusion import LatentDiffusionModule

WEIGHTS, DTYPES = ("ema", "raw"), {"float32": torch.float32, "float16": torch.float16}


def export(run: Path, out: Path, to: str, weights: str = "ema", dtype: str = "float32") -> None:
    """Writes OUT aside, reads it back, compares it with the run, and only then puts it in its place.

    Args:
        to: a key of WRITERS. weights: of WEIGHTS. dtype: of DTYPES.

    Raises:
        UserError: an unknown choice; OUT is there; the run is of a structure that the format cannot express, naming the
            argument; or what was written does not read back as the run's.
    """
    for name, value, known in (("--to", to, WRITERS), ("--weights", weights, WEIGHTS), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise UserError(f"{name} {value}: give {' or '.join(known)}")
    aside = out.with_name(f"{out.stem}.partial{out.suffix}")
    card = aside / "README.md" if to == "diffusers" else out.with_suffix(".md")
    for path in (out, card):
        if path.exists():
            raise UserError(f"{path} is there already; give another name, or delete it")
    if (out.suffix == ".safetensors") != (to == "single-file"):
        raise UserError(f"{out}: --to single-file wants OUT to end in .safetensors, and --to diffusers a folder")
    model = _model_of(run, weights)
    try:
        model = WRITERS[to](model, aside, DTYPES[dtype])
        _compare(model, sources.read(aside, model.prediction), DTYPES[dtype])
        card.write_text(_card(model, run, out, to, weights, dtype))
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)


def _model_of(run: Path, weights: str) -> Model:
    """A run's model, when others can express it. Raises UserError naming the argument that they cannot."""
    cfg = config.run_config(run)
    module, _ = config.load_run(run)
    if weights == "raw":
        newest = checkpointing.newest(run)
        assert newest is not None  # or there were no run to load
        checkpoint = checkpointing.read(newest)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    _expect(module, LatentDiffusionModule, "model")
    stage, denoiser = module.first_stage, module.denoiser
    _expect(stage, FirstStage, "model.first_stage")
    _expect(stage.autoencoder, AutoencoderKL, "model.first_stage")
    _expect(denoiser.backbone, UNet, "model.backbone")
    _expect(denoiser.parameterization, (Eps, V), "model.parameterization")
    unet_config = layouts.unet_config(config.plain(cfg.model.backbone))
    autoencoder = stage.autoencoder.state_dict()
    groups = stage.autoencoder.encoder.norm_out.num_groups
    text, sizes, zero_null = texts(module.conditioner, cfg.model.conditioner)
    return Model(
        unet=denoiser.backbone.state_dict(),
        unet_arguments=layouts.unet_arguments(unet_config),
        autoencoder=autoencoder,
        autoencoder_arguments=layouts.autoencoder_arguments_of(autoencoder) | {"groups": groups},
        mean=stage.mean.flatten().tolist(),
        std=stage.std.flatten().tolist(),
        text=text,
        prediction="eps" if isinstance(denoiser.parameterization, Eps) else "v",
        schedule=_indexed(denoiser.parameterization.noise_label),
        side=cfg.data.side,
        size_width=sizes.width if sizes else 256,
        zero_null=zero_null,
    )


def _expect(value: Any, kinds: type | tuple[type, ...], name: str) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise UserError(f"{name} is a {type(value).__name__}: what is exported has {wanted} there")


def _indexed(label: Any) -> Linear:
    """The schedule whose index a noise label is."""
    schedule: Any = getattr(label, "__self__", None) or next(iter(getattr(label, "args", ())), None)
    if type(schedule) not in SCHEDULES.values():
        raise UserError(
            "model.parameterization.noise_label is not the index of a Linear or ScaledLinear schedule, which is what others "
            "give a U-Net: train with that"
        )
    return schedule


def texts(conditioner: nn.Module, node: Any) -> tuple[list[Text], SizeCrop | None, bool]:
    """One encoder and no vector, as SD v1 and v2 have it, or two with sizes, as SDXL: (texts, sizes, null of zeros)."""
    sizes, where = None, "model.conditioner"
    if isinstance(conditioner, Combined) and len(conditioner.parts) == 2:
        conditioner, sizes = conditioner.parts
        node, where = node.first, f"{where}.first"
        _expect(sizes, SizeCrop, "model.conditioner.others")
    _expect(conditioner, TextConditioner, where)
    encoder, node = conditioner.encoder, node.encoder
    _expect(encoder, ConcatText if sizes else (CLIPText, OpenCLIPText), f"{where}.encoder")
    encoders = list(encoder.encoders) if sizes else [encoder]
    nodes = list(node.groups[0]) if sizes else [node]
    wanted: dict[str, tuple[Any, list[Any]]] = {
        "pooled": (conditioner.pooled, [bool(sizes)]),
        "to_null": (type(conditioner.to_null), [nn.Identity, Zeros] if sizes else [nn.Identity]),
    }
    if sizes:
        wanted |= {"encoder.groups": (encoder.groups, [[2]]), "encoder.pooled": (encoder.pooled, [[False, True]])}
    texts = []
    for one, its in zip(encoders, nodes, strict=False):
        _expect(one, (CLIPText, OpenCLIPText), f"{where}.encoder")
        wanted |= {
            "encoder.attend_to_padding": (one.attend_to_padding, [True]),
            "encoder.chunks": (one.tokenize.chunks, [1]),
            "encoder.final_norm": (one.final_norm, [not sizes]),
            "encoder.layer": (one.layer, [-2] if sizes else [-1, -2]),
        }
        for name, (value, known) in wanted.items():
            if value not in known:
                raise UserError(f"{where}.{name} is {value}: others can only express {' or '.join(map(str, known))}")
        texts.append(_text(one, its, drop_last=one.layer == -2 and not sizes))
    return texts, sizes, isinstance(conditioner.to_null, Zeros)


def _text(encoder: PretrainedText, node: Any, drop_last: bool) -> Text:
    state = {key.removeprefix("text_model."): value for key, value in encoder.model.state_dict().items()}
    if isinstance(encoder, OpenCLIPText):
        state = keys.from_open_clip(state)
        block = encoder.model.transformer.resblocks[0]
        quick = type(block.mlp.gelu).__name__ == "QuickGELU"
        heads = {"num_attention_heads": block.attn.num_heads}
        given = layouts.text_config_of(state, "quick_gelu" if quick else "gelu") | heads
    else:
        given = {"architectures": [type(encoder.model).__name__]} | json.loads(encoder.model.config.to_json_string())
    if drop_last:  # the last layer but one, normalized: the last layer of a shorter encoder
        state = sources.without_last_layer(state)
        given["num_hidden_layers"] -= 1
    folder = node.get("tokenizer") or node.get("weights")
    folder = None if folder is None else fetch.local(folder)
    if folder is None or not any((folder / name).is_file() for name in TOKENIZER):
        return Text(state, given, None, encoder.tokenize.pad)
    if node.get("pad") is not None:
        raise UserError("model.conditioner.encoder.pad: the tokenizer has its own padding, which is what is exported")
    return Text(state, given, folder)


def _scaled(model: Model, scaling: float) -> Model:
    """The same model whose latents only want `scaling`: their statistics go into the convolutions around the posterior.

    z' = (z - mean) / (std * scaling), so that z' * scaling is what diffusion works on.
    """
    if not any(model.mean) and all(abs(std * scaling - 1) < 1e-6 for std in model.std):
        return model
    c, state = len(model.mean), {key: value.double() for key, value in model.autoencoder.items()}
    mean, std = torch.tensor(model.mean).double(), torch.tensor(model.std).double() * scaling
    state["quant_conv.weight"] /= torch.cat([std, torch.ones(c)])[:, None, None, None]
    bias = state["quant_conv.bias"]
    state["quant_conv.bias"] = torch.cat([(bias[:c] - mean) / std, bias[c:] - 2 * std.log()])
    state["post_quant_conv.bias"] += state["post_quant_conv.weight"][:, :, 0, 0] @ mean
    state["post_quant_conv.weight"] *= std[:, None, None]
    autoencoder = {key: value.float() for key, value in state.items()}
    return replace(model, autoencoder=autoencoder, mean=[0.0] * c, std=[1 / scaling] * c)


def write_diffusers(model: Model, out: Path, dtype: torch.dtype) -> Model:
    """Returns the model as it was written: with per-channel statistics of the latents in the first stage's weights."""
    plain = not any(model.mean) and len(set(model.std)) == 1  # else the scaling factor cannot say it
    scaling = float(f"{1 / model.std[0]:.7g}") if plain else 1.0
    model = _scaled(model, scaling)
    two = len(model.text) == 2
    unet, vae = (
        sources.on_meta(*each) for each in ((UNet, model.unet_arguments), (AutoencoderKL, model.autoencoder_arguments))
    )
    unet_config = layouts.unet_config(model.unet_arguments) | {"sample_size": model.side // vae.factor}
    vae_config = layouts.autoencoder_config(model.autoencoder_arguments)
    parts: list[tuple[str, dict[str, str], State, Config]] = [
        ("unet", keys.unet_keys(unet), model.unet,
         unet_config | ({"addition_time_embed_dim": model.size_width} if two else {})),
        ("vae", keys.autoencoder_keys(vae), model.autoencoder,
         vae_config | {"scaling_factor": scaling, "sample_size": model.side}),
    ]  # fmt: skip
    for name, names, state, content in parts:
        write_weights(out / name / "diffusion_pytorch_model.safetensors", sources.theirs(state, names), dtype)
        write_json(out / name / "config.json", content)
    (kind,) = (theirs for theirs, ours in SCHEDULES.items() if type(model.schedule) is ours)
    write_json(out / "scheduler" / "scheduler_config.json", {
        "_class_name": "DDIMScheduler", "beta_schedule": kind, "beta_start": model.schedule.beta_start,
        "beta_end": model.schedule.beta_end, "num_train_timesteps": model.schedule.timesteps, "clip_sample": False,
        "prediction_type": PREDICTIONS[model.prediction], "set_alpha_to_one": True, "steps_offset": 1,
        "timestep_spacing": "leading",
    })  # fmt: skip
    index: Config = {
        "_class_name": "StableDiffusionXLPipeline" if two else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    index |= {"force_zeros_for_empty_prompt": model.zero_null} if two else {"safety_checker": [None, None]}
    for text, suffix in zip(model.text, ("", "_2"), strict=False):
        write_text(text, out / f"text_encoder{suffix}", out / f"tokenizer{suffix}", dtype)
        index[f"text_encoder{suffix}"] = ["transformers", text.config["architectures"][0]]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    write_json(out / "model_index.json", index)
    return model


def write_single_file(model: Model, out: Path, dtype: torch.dtype) -> Model:
    """Returns the model as it was written: with the layout's own scaling factor."""
    two, quick = len(model.text) == 2, model.text[0].config["hidden_act"] == "quick_gelu"
    prefixes = next(
        each for each in LAYOUTS if len(each) == 1 + two and (two or each[0].endswith("transformer.") == quick)
    )
    if model.schedule != ScaledLinear():
        raise UserError(
            f"model.parameterization.noise_label: a single file means {ScaledLinear()}, not {model.schedule}"
        )
    model = _scaled(model, LAYOUTS[prefixes].scaling)
    unet = {re.sub(r"^label_emb\.(\d)", r"label_emb.0.\1", key): value for key, value in model.unet.items()}
    state = {sources.UNET + key: value for key, value in unet.items()}
    state |= {sources.AUTOENCODER + key: value for key, value in model.autoencoder.items()}
    for prefix, text in zip(prefixes, model.text, strict=True):
        if prefix.endswith("transformer."):
            state |= {f"{prefix}text_model.{key}": value for key, value in text.state.items()}
        else:
            theirs = sources.with_unused_layer(text.state) if not two else text.state
            state |= {prefix + key: value for key, value in keys.to_open_clip(theirs).items()}
    if model.prediction == "v":
        state["v_pred"] = torch.ones(1)  # ComfyUI's marker
    said = {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": out.stem.removesuffix(".partial"),
            "modelspec.prediction_type": "v" if model.prediction == "v" else "epsilon",
            "modelspec.resolution": f"{model.side}x{model.side}"}  # fmt: skip
    write_weights(out, state, dtype, said)
    return model


WRITERS: dict[str, Callable[[Model, Path, torch.dtype], Model]] = {
    "diffusers": write_diffusers,
    "single-file": write_single_file,
}


def _compare(model: Model, back: Model, dtype: torch.dtype) -> None:
    """Raises UserError naming the first thing that does not read back as it was."""
    for name in ("prediction", "schedule", "zero_null"):
        _same(name, getattr(model, name), getattr(back, name))
    for name in ("unet_arguments", "autoencoder_arguments"):
        ours, theirs = getattr(model, name), getattr(back, name)
        for key in ours:
            _same(f"{name}.{key}", ours[key], theirs[key])
    for one, other in zip(model.text, back.text, strict=True):
        for key in ("hidden_act", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
            _same(f"text encoder's {key}", one.config[key], other.config[key])
    pairs = [("unet", model.unet, back.unet), ("autoencoder", model.autoencoder, back.autoencoder),
             *(("text encoder", a.state, b.state) for a, b in zip(model.text, back.text, strict=True))]  # fmt: skip
    for part, ours, theirs in pairs:
        _same(f"{part}'s names", sorted(ours), sorted(theirs))
        for key, value in ours.items():
            if not torch.equal(value.cpu().to(dtype).float(), theirs[key]):
                raise UserError(f"the {part}'s {key} did not read back as it was written")


def _same(name: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise UserError(f"{name} is {ours}; what was written reads back as {theirs}: this format cannot say it")


def _card(model: Model, run: Path, out: Path, to: str, weights: str, dtype: str) -> str:
    pipeline = "StableDiffusionXLPipeline" if len(model.text) == 2 else "StableDiffusionPipeline"
    load = f'from_pretrained("{out.name}")' if to == "diffusers" else f'from_single_file("{out.name}")'
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# {out.stem}

A text-to-image latent diffusion model, exported from the run `{run.name}` ({weights} weights, {dtype}).

| | |
|---|---|
| predicts | {PREDICTIONS[model.prediction]} |
| noise schedule | {model.schedule} |
| scaling factor of the latents | {1 / model.std[0]:.7g} |
| pictures | {model.side} x {model.side} |

```python
from diffusers import {pipeline}

pipe = {pipeline}.{load}
```
"""
