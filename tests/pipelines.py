"""Tiny diffusers pipelines with random weights, as their own library saves them: what interop is tested against."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.interop import importing, sources

WORDS = ["a", "red", "circle", "blue", "square", "on", "the", "sky"]
CROSS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
LAST = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
UNETS: dict[str, dict[str, Any]] = {  # reduced widths; the single file's conventions hold: 8 heads, or heads of width 64
    "sd1": {"block_out_channels": (32, 64), "attention_head_dim": 8, "cross_attention_dim": 64, **CROSS},
    "sd2": {"block_out_channels": (64, 128), "attention_head_dim": (1, 2), "cross_attention_dim": 64,
            "use_linear_projection": True, **CROSS},
    "sdxl": {"block_out_channels": (64, 128), "attention_head_dim": (1, 2), "cross_attention_dim": 192,
             "use_linear_projection": True, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 64 + 6 * 256, **LAST},
}  # fmt: skip


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """Weights of one scale everywhere: a fresh network's end is too quiet to show a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        spread = 0.1 if p.dim() == 1 else p[0].numel() ** -0.5
        offset = 1.0 if p.dim() == 1 and (p == 1).all() else 0.0
        p.data = torch.randn(p.shape, generator=generator) * spread + offset
    return module.eval()


def unet(kind: str, **changes: Any) -> UNet2DConditionModel:
    arguments = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1} | UNETS[kind] | changes
    return seeded(UNet2DConditionModel(**arguments), 1)


def autoencoder(**changes: Any) -> AutoencoderKL:
    arguments = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
                 "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16}  # fmt: skip
    return seeded(AutoencoderKL(**arguments | changes), 2)


def text_model(activation: str, width: int = 64, projection: bool = False, seed: int = 3) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=96, num_hidden_layers=3, num_attention_heads=width // 64,
        projection_dim=64, hidden_act=activation, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    return seeded((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A vocabulary of few words; the special tokens have CLIP's ids."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for word in WORDS for letter in word})
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            tokens += [parts[0]] if parts[0] not in tokens else []
    vocabulary = {token: number for number, token in enumerate(["!", *tokens])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad)


def scheduler(**changes: Any) -> DDIMScheduler:
    """Stable Diffusion's, ending at sigma = 0 as our grids do."""
    arguments = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
                 "set_alpha_to_one": True, "steps_offset": 1}  # fmt: skip
    return DDIMScheduler(**arguments | changes)


def pipeline(kind: str, folder: Path, vae: AutoencoderKL | None = None, **schedule: Any) -> Any:
    vae = vae or autoencoder(scaling_factor=0.13025 if kind == "sdxl" else 0.18215)
    activation = "gelu" if kind == "sd2" else "quick_gelu"
    parts = {"vae": vae, "unet": unet(kind), "scheduler": scheduler(**schedule), "tokenizer": tokenizer(folder / "words"),
             "text_encoder": text_model(activation)}  # fmt: skip
    if kind == "sdxl":
        second = {"text_encoder_2": text_model("gelu", 128, True, 4), "tokenizer_2": tokenizer(folder / "words_2", "!")}
        return quiet(StableDiffusionXLPipeline(**parts, **second, add_watermarker=False))
    return quiet(
        StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, z: Tensor, captions: list[str], steps: int) -> Tensor:
    """(B, 3, H, W) in [0, 1], with guidance 7.5, from the latents of pure noise z."""
    images = pipe(captions, latents=z.clone(), num_inference_steps=steps, guidance_scale=7.5, output_type="np", height=16,
                  width=16).images  # fmt: skip
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def config_of(model: Any) -> dict[str, Any]:
    """As it is in config.json."""
    return json.loads(model.to_json_string())


def saved(kind: str, folder: Path, **schedule: Any) -> Path:
    """As `save_pretrained` leaves it."""
    pipeline(kind, folder, **schedule).save_pretrained(folder / kind, safe_serialization=True)
    return folder / kind


def imported(kind: str, folder: Path) -> Path:
    """The run that `ldm import` makes of such a pipeline."""
    source = saved(kind, folder)
    importing.write_run(sources.read(source), folder / "run", source)
    return folder / "run"
