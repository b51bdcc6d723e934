"""Writes a published model as a run directory, which evaluate.py, train.py and config.load_run take."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldm import config
from ldm.diffusion.parameterization import Eps, V
from ldm.errors import UserError
from ldm.files import aside
from ldm.interop.files import write_text
from ldm.interop.sources import Model
from ldm.training import ema
from ldm.training.base import digest

DDIM = ["sampling/solver=ddim", "sampling/spacing=leading", "sampling.steps=50", "sampling.guidance.scale=7.5"]
PARAMETERIZATIONS = {"eps": Eps, "v": V}


def write_run(model: Model, out: Path, source: Path) -> None:
    """OUT: config.yaml, checkpoints/, and the frozen parts: first_stage/ (a run of its own), text_encoder/, tokenizer/.

    Raises:
        UserError: there is something in OUT already, or the model is of a kind that no conditioner here serves.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")
    if model.unet_arguments["in_channels"] != model.autoencoder_arguments["latent_channels"]:
        raise UserError(
            f"{source}: its U-Net takes {model.unet_arguments['in_channels']} channels and the first stage gives "
            f"{model.autoencoder_arguments['latent_channels']}: inpainting, depth and upscaling models are not imported"
        )
    write_first_stage(model, out / "first_stage", source)
    for text, suffix in zip(model.text, ("", "_2"), strict=False):
        write_text(text, out / f"text_encoder{suffix}", out / f"tokenizer{suffix}", torch.float32)
    cfg = _compose(out.name, model.side, "model/loss=scaled_linear", "sampling/schedule=scaled_linear", *DDIM)
    kind = type(model.schedule)
    schedule = {"_target_": f"{kind.__module__}.{kind.__name__}", **asdict(model.schedule)}
    cfg.model.backbone = {"_target_": "ldm.models.unet.UNet", **model.unet_arguments}
    cfg.model.parameterization = {
        "_target_": f"ldm.diffusion.parameterization.{PARAMETERIZATIONS[model.prediction].__name__}",
        # trained on indices of the schedule: c_noise is the index of sigma
        "noise_label": {"_target_": f"{schedule['_target_']}.index", "_partial_": True, "_args_": [schedule]},
    }
    cfg.model.loss.schedule = cfg.sampling.schedule = schedule
    cfg.model.first_stage = {
        "_target_": "ldm.config.first_stage",
        "run": str(out / "first_stage"),
        "command": f"ldm import {source} {out}",
    }
    cfg.model.conditioner = _conditioner(model, out)
    config.OmegaConf.save(cfg, out / "config.yaml", resolve=True)

    module = config.build(config.run_config(out).model)
    module.denoiser.backbone.load_state_dict(model.unet)
    average = model.unet if model.average is None else model.average
    names = {f"denoiser.backbone.{key}": value for key, value in average.items()}
    assert names.keys() == ema.trainable(module).keys()
    checkpoint = {"state_dict": module.state_dict(), "global_step": 0, "ema": {"updates": 0, "weights": names}}
    module.on_save_checkpoint(checkpoint)
    _save(checkpoint, out)


def _conditioner(model: Model, out: Path) -> dict[str, Any]:
    """Padding is attended to, as Stable Diffusion was trained; SDXL takes both encoders' last states but one, as they are."""
    two = len(model.text) == 2
    encoders = [
        {
            "_target_": "ldm.models.text_pretrained.CLIPText",
            "weights": str(out / f"text_encoder{suffix}"),
            "tokenizer": str(out / f"tokenizer{suffix}"),
            "length": text.config["max_position_embeddings"],
            "attend_to_padding": True,
            **({"layer": -2, "final_norm": False, "projection": "text_projection.weight" in text.state} if two else {}),
        }
        for text, suffix in zip(model.text, ("", "_2"), strict=False)
    ]
    here = "ldm.models.conditioners"
    text = {"_target_": f"{here}.TextConditioner", "pooled": two, "encoder": encoders[0]}
    if not two:
        return text
    joined = {"_target_": "ldm.models.text_pretrained.ConcatText", "groups": [encoders], "pooled": [False, True]}
    null = {"to_null": {"_target_": f"{here}.Zeros"}} if model.zero_null else {}
    sizes = {"_target_": f"{here}.SizeCrop", "side": model.side, "width": model.size_width}
    return {"_target_": f"{here}.Combined", "first": text | null | {"encoder": joined}, "others": [sizes]}


def write_first_stage(model: Model, out: Path, source: Path) -> None:
    """As the run of an autoencoder, at its step 0."""
    out.mkdir(parents=True)
    cfg = _compose(out.name, model.side, "model=autoencoder", "callbacks=autoencoder")
    cfg.model.autoencoder = {"_target_": "ldm.models.autoencoder.AutoencoderKL", **model.autoencoder_arguments}
    config.OmegaConf.save(cfg, out / "config.yaml", resolve=True)
    weights = {f"autoencoder.{key}": value for key, value in model.autoencoder.items()}
    statistics = {"latent_mean": torch.tensor(model.mean), "latent_std": torch.tensor(model.std)}
    state = {"state_dict": weights | statistics, "global_step": 0, "ema": {"updates": 0, "weights": weights}}
    _save(state | {"frozen_digest": digest({})}, out)


def _compose(name: str, side: int, *choices: str) -> Any:
    """A run's config as train.py would have it. What only training asks for is 1."""
    plain = [f"name={name}", f"data.side={side}", "data.batch_size=1", "trainer.max_steps=1", "logger=none"]
    return config.compose(*plain, *choices)


def _save(checkpoint: dict[str, Any], out: Path) -> None:
    """Last, so that an import that was cut short has no checkpoint."""
    path = out / "checkpoints" / "step_00000000.ckpt"
    path.parent.mkdir()
    with aside(path) as partial:
        torch.save(checkpoint, partial)
