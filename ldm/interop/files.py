"""Writes the parts of a model in the layout of a diffusers pipeline, which our run directories keep text encoders in too."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ldm.errors import UserError
from ldm.interop.layouts import State
from ldm.interop.sources import Text
from ldm.models.text import bpe

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
              "added_tokens.json")  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_weights(path: Path, state: State, dtype: torch.dtype, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cast = {key: value.detach().cpu().to(dtype).contiguous() for key, value in state.items()}
    save_file(cast, path, {"format": "pt"} | (metadata or {}))


def write_text(text: Text, folder: Path, tokenizer: Path, dtype: torch.dtype) -> None:
    """A text encoder as every version of transformers reads it, and its tokenizer."""
    named = {key if key.startswith("text_projection") else f"text_model.{key}": v for key, v in text.state.items()}
    write_weights(folder / "model.safetensors", named, dtype)
    write_json(folder / "config.json", text.config)
    if text.tokenizer is None:
        return _write_clip_tokenizer(tokenizer, text.config["max_position_embeddings"], text.pad)
    files = [text.tokenizer / name for name in TOKENIZER if (text.tokenizer / name).is_file()]
    if not files:
        raise UserError(f"{text.tokenizer} has no tokenizer: none of {', '.join(TOKENIZER)}")
    tokenizer.mkdir(parents=True)
    for file in files:
        shutil.copy(file, tokenizer)


def _write_clip_tokenizer(folder: Path, length: int, pad: int) -> None:
    """CLIP's byte pairs, as transformers' CLIPTokenizer."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = dict(bpe().encoder)
    names = {bpe().sot_token_id: start, bpe().eot_token_id: end}
    vocabulary = {names.get(number, token): number for token, number in vocabulary.items()}
    (padding,) = (token for token, number in vocabulary.items() if number == pad)
    write_json(folder / "vocab.json", vocabulary)
    merges = "\n".join(" ".join(pair) for pair in bpe().bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": padding}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, "add_prefix_space": False,
    })  # fmt: skip
