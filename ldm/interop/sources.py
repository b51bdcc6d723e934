"""Reads published models: a diffusers folder, or a single file in CompVis' layout. Nothing in them is ever executed."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.diffusion.schedules import Linear, ScaledLinear
from ldm.errors import UserError
from ldm.interop import keys, layouts
from ldm.interop.layouts import Arguments, Config, State
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text_pretrained import CLIPText
from ldm.models.unet import UNet

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # ours, diffusers' prediction_type
SCHEDULES = {"scaled_linear": ScaledLinear, "linear": Linear}  # diffusers' beta_schedule


class Text(NamedTuple):
    """A CLIP text encoder. state: transformers' names; tokenizer: its folder; None: CLIP's byte pairs, padded with `pad`."""

    state: State
    config: Config
    tokenizer: Path | None
    pad: int = 0


@dataclass(frozen=True)
class Model:
    """A text-to-image model as plain data; weights under our names, float32.

    average: of the U-Net, where the file has one. mean, std: per latent channel. prediction: a key of PREDICTIONS.
    schedule: of the indices that it was trained on. side: of its pictures, in pixels. size_width: of SDXL's sinusoids of
    sizes. zero_null: the empty prompt is zeros (SDXL). notes: what to tell the user.
    """

    unet: State
    unet_arguments: Arguments
    autoencoder: State
    autoencoder_arguments: Arguments
    mean: list[float]
    std: list[float]
    text: list[Text]
    prediction: str
    schedule: Linear
    side: int
    average: State | None = None
    size_width: int = 256
    zero_null: bool = False
    notes: list[str] = field(default_factory=list)


class Layout(NamedTuple):
    """What a single file does not say of itself. prediction: None where both are published."""

    scaling: float
    side: int
    prediction: str | None


_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_CLIP_XL, _OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
LAYOUTS = {  # by where the text encoders are
    (_CLIP,): Layout(0.18215, 512, "eps"),
    (_OPEN_CLIP,): Layout(0.18215, 768, None),
    (_CLIP_XL, _OPEN_CLIP_XL): Layout(0.13025, 1024, "eps"),
}
UNET, AUTOENCODER, AVERAGE = "model.diffusion_model.", "first_stage_model.", "model_ema."
# a training checkpoint's tables of the schedule, and what text encoders carry beside their weights
_IDLE = re.compile(
    r"betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar|v_pred|scale_factor|"
    r"model_ema\..*|denoiser\.sigmas|.*\.position_ids|.*\.logit_scale|.*\.attn_mask|first_stage_model\.loss\..*"
)


def read(source: Path, prediction: str | None = None) -> Model:
    """A diffusers folder or a single file.

    Args:
        prediction: of PREDICTIONS, for a source that does not say what its network predicts.

    Raises:
        UserError: naming the file, and the key that is missing, not known, of another shape, or not finite.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise UserError(f"--prediction {prediction}: give eps or v")
    if not source.exists():
        raise UserError(f"there is no {source}; give a diffusers folder, or a .safetensors or .ckpt file")
    try:
        return _folder(source, prediction) if source.is_dir() else _single_file(source, prediction)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{source}: unknown layout, there is no {error.args[0]}; it reads SD v1, v2 and SDXL"
        ) from error


def read_weights(path: Path, notes: list[str]) -> State:
    """The tensors of a .safetensors, .ckpt or .pt file as float32, without wrappers' prefixes."""
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except SafetensorError as error:
        raise UserError(f"{path} is no sound safetensors file: {error}") from error
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} holds more than tensors, or is damaged ({type(error).__name__}: {reason}); nothing in it was "
            "executed. Give the model's .safetensors file"
        ) from error
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {key} is a {type(value).__name__}, not a tensor")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: {key} holds NaN or infinite values")
    clean = {key.removeprefix("module.").replace("_orig_mod.", ""): value for key, value in state.items()}
    if len(clean) < len(state):
        raise UserError(f"{path} holds a key twice: with and without the prefix module. or _orig_mod.")
    if stripped := len(clean.keys() - state.keys()):
        notes.append(f"{path.name}: stripped module. or _orig_mod. from {stripped} keys")
    return {key: value.float() if value.is_floating_point() else value for key, value in clean.items()}


def fit(network: nn.Module, state: State, what: str) -> State:
    """The state, when it has a network's names and shapes and no others. Raises UserError naming the first that differs."""
    expected = network.state_dict()
    for kind, names in (("misses", expected.keys() - state.keys()), ("has an unknown", state.keys() - expected.keys())):
        if names:
            raise UserError(f"{what} {kind} key {min(names)} ({len(names)} in all)")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"{what}: {key} is {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
    return state


def _fit_text(text: Text, what: str) -> Text:
    network = on_meta(CLIPText, {"config": text.config, "projection": "text_projection.weight" in text.state}).model
    prefix = "text_model." if hasattr(network, "text_model") else ""  # versions and classes of transformers differ
    named = {key if key.startswith("text_proj") else prefix + key: value for key, value in text.state.items()}
    fit(network, named, what)
    return text


def on_meta(kind: type[nn.Module], arguments: Arguments) -> nn.Module:
    with torch.device("meta"):
        return kind(**arguments)


def _folder(folder: Path, prediction: str | None) -> Model:
    notes: list[str] = []
    index = _json(folder / "model_index.json")
    unet_config, vae = _json(folder / "unet" / "config.json"), _json(folder / "vae" / "config.json")
    unet_arguments, vae_arguments = layouts.unet_arguments(unet_config), layouts.autoencoder_arguments(vae)
    unet, autoencoder = on_meta(UNet, unet_arguments), on_meta(AutoencoderKL, vae_arguments)
    parts = []
    for network, part, names in ((unet, "unet", keys.unet_keys), (autoencoder, "vae", keys.autoencoder_keys)):
        state = _folder_weights(folder / part, "diffusion_pytorch_model", notes)
        parts.append(fit(network, renamed(network, state, names(network)), f"{folder}/{part}"))
    text = []
    for suffix in ("", "_2"):
        if f"text_encoder{suffix}" in index:
            state = _folder_weights(folder / f"text_encoder{suffix}", "model", notes)
            state = {key.removeprefix("text_model."): value for key, value in state.items() if not _IDLE.fullmatch(key)}
            config = _json(folder / f"text_encoder{suffix}" / "config.json")
            text.append(_fit_text(Text(state, config, folder / f"tokenizer{suffix}"), f"{folder}/text_encoder{suffix}"))
    predicted, schedule = _schedule(_json(folder / "scheduler" / "scheduler_config.json"))
    if prediction not in (None, predicted):
        raise UserError(f"--prediction {prediction}: {folder}/scheduler says prediction_type={PREDICTIONS[predicted]}")
    scaling, channels = vae.get("scaling_factor", 0.18215), vae_arguments["latent_channels"]
    mean = vae.get("latents_mean") or [vae.get("shift_factor") or 0.0] * channels
    std = [each / scaling for each in vae.get("latents_std") or [1.0] * channels]
    side = (unet_config.get("sample_size") or 64) * 2 ** (len(vae_arguments["multipliers"]) - 1)
    return Model(parts[0], unet_arguments, parts[1], vae_arguments, mean, std, text, predicted, schedule, side,
                 size_width=unet_config.get("addition_time_embed_dim") or 256,
                 zero_null=index.get("force_zeros_for_empty_prompt", len(text) == 2), notes=notes)  # fmt: skip


def _schedule(config: Config) -> tuple[str, Linear]:
    """(prediction, schedule) of a scheduler's config."""
    kinds, given = {theirs: ours for ours, theirs in PREDICTIONS.items()}, config.get("prediction_type", "epsilon")
    known: dict[str, dict[str, Any]] = {"prediction_type": kinds, "beta_schedule": SCHEDULES}
    for key, value in {"prediction_type": given, "beta_schedule": config["beta_schedule"]}.items():
        if value not in known[key]:
            raise UserError(f"scheduler_config.json: {key}={value} is not known; it may be {' or '.join(known[key])}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(key):
            raise UserError(f"scheduler_config.json: {key}={config[key]} is not supported")
    kind = SCHEDULES[config["beta_schedule"]]
    return kinds[given], kind(config["beta_start"], config["beta_end"], config["num_train_timesteps"])


def theirs(state: State, names: dict[str, str]) -> State:
    """A state dict under diffusers' names; linear where ours are an autoencoder's 1x1 convolutions."""
    out = {names[key]: value for key, value in state.items()}
    return {k: v[:, :, 0, 0] if ".to_" in k and v.dim() == 4 else v for k, v in out.items()}


def renamed(network: nn.Module, state: State, names: dict[str, str]) -> State:
    """A state dict under our names; 1x1 convolutions where theirs are linear. A name nobody knows stays."""
    ours, shapes = {theirs: key for key, theirs in names.items()}, network.state_dict()
    out = {ours.get(key, key): value for key, value in state.items()}
    linear = {key for key in out if key in shapes and (*out[key].shape, 1, 1) == tuple(shapes[key].shape)}
    return {key: value[:, :, None, None] if key in linear else value for key, value in out.items()}


def _folder_weights(folder: Path, stem: str, notes: list[str]) -> State:
    index = folder / f"{stem}.safetensors.index.json"
    shards = {Path(name).name for name in _json(index)["weight_map"].values()} if index.is_file() else set()
    names = (
        sorted(shards) or [n for n in (f"{stem}.safetensors", f"{stem}.fp16.safetensors") if (folder / n).is_file()][:1]
    )
    if not names:
        raise UserError(f"{folder} has no {stem}.safetensors; save the pipeline with safe_serialization=True")
    state: State = {}
    for name in names:
        state |= read_weights(folder / name, notes)
    return state


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}); it belongs to every diffusers pipeline"
        ) from error


def _single_file(path: Path, prediction: str | None) -> Model:
    notes: list[str] = []
    state = read_weights(path, notes)
    prefixes = tuple(p for each in LAYOUTS for p in each if any(key.startswith(p) for key in state))
    if prefixes not in LAYOUTS:
        raise UserError(
            f"{path}: unknown layout, its first key is {min(state, default='none')}; it reads whole models of SD v1, v2 and "
            "SDXL, with U-Net, first stage and text encoders in one file"
        )
    parts = {p: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p) and not _IDLE.fullmatch(k)}
             for p in (UNET, AUTOENCODER, *prefixes)}  # fmt: skip
    unknown = [key for key in state if not key.startswith(tuple(parts)) and not _IDLE.fullmatch(key)]
    if unknown:
        raise UserError(f"{path} has an unknown key {min(unknown)} ({len(unknown)} in all)")
    layout, said = LAYOUTS[prefixes], _said(path, state)
    predicted = prediction or said or layout.prediction
    if predicted is None:
        raise UserError(
            f"{path}: of SD v2 both kinds are published; give --prediction eps (base, 512 px) or v (768 px)"
        )
    if said not in (None, predicted):
        raise UserError(f"--prediction {prediction}: {path} says of itself that it predicts {said}")
    unet = {re.sub(r"^label_emb\.0\.(\d)", r"label_emb.\1", key): value for key, value in parts[UNET].items()}
    unet_arguments = layouts.unet_arguments_of(unet)
    arguments = layouts.autoencoder_arguments_of(parts[AUTOENCODER])
    shapes = on_meta(AutoencoderKL, arguments)
    autoencoder = renamed(shapes, parts[AUTOENCODER], {})  # some files were saved with linear attention
    fit(on_meta(UNet, unet_arguments), unet, f"{path}, under {UNET},")
    fit(shapes, autoencoder, f"{path}, under {AUTOENCODER},")
    text = [_fit_text(_text(prefix, parts[prefix]), f"{path}, under {prefix},") for prefix in prefixes]
    channels, scaling = arguments["latent_channels"], float(state.get("scale_factor", layout.scaling))
    return Model(unet, unet_arguments, autoencoder, arguments, [0.0] * channels, [1 / scaling] * channels,
                 text, predicted, ScaledLinear(), layout.side,
                 _average(state, unet), zero_null=len(prefixes) == 2, notes=notes)  # fmt: skip


def _said(path: Path, state: State) -> str | None:
    """What a file says of its own prediction, by a marker or in Stability's ModelSpec."""
    if "v_pred" in state:
        return "v"
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        return {"epsilon": "eps", "v": "v"}.get((file.metadata() or {}).get("modelspec.prediction_type", ""))


def _average(state: State, unet: State) -> State | None:
    """CompVis' LitEma holds the average under names without dots."""
    if "model_ema.num_updates" not in state:
        return None
    names = {key: f"{AVERAGE}diffusion_model{key.replace('.', '')}" for key in unet}
    return {key: state[name] for key, name in names.items()}


def _text(prefix: str, state: State) -> Text:
    if prefix in (_CLIP, _CLIP_XL):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
        config = layouts.text_config_of(state, "quick_gelu")
        return Text(state, config, None, config["eos_token_id"])
    state = keys.from_open_clip(state)
    if prefix == _OPEN_CLIP:  # SD v2 conditions on the last layer but one: the last, and the projection, are never used
        state = without_last_layer(state)
    return Text(state, layouts.text_config_of(state, "gelu"), None)


def _last(state: State) -> str:
    return f"encoder.layers.{max(int(key.split('.')[2]) for key in state if key.startswith('encoder.layers.'))}."


def without_last_layer(state: State) -> State:
    """A text encoder that ends at its last layer but one."""
    return {key: value for key, value in state.items() if not key.startswith((_last(state), "text_projection."))}


def with_unused_layer(state: State) -> State:
    """The inverse: CompVis' SD v2 files have a last layer that nothing uses."""
    last = _last(state)
    unused = f"encoder.layers.{int(last.split('.')[2]) + 1}."
    return state | {key.replace(last, unused): value.clone() for key, value in state.items() if key.startswith(last)}
