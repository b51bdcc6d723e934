"""Text encoders with pretrained weights: CLIP, OpenCLIP, T5, BERT and their like, frozen unless told otherwise.

Shapes: B captions, C chunks of L tokens each, N = B*C, D token width, V pooled width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.fetch import local
from ldm.keyed_random import KeyedRandom
from ldm.models.text import Tokenizer, bpe

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class PretrainedText(nn.Module):
    """captions -> tokens (B, C*L, D), mask (B, C*L) bool, vector (B, V): what the classes below share.

    Every caption is padded to the same length, so its states do not depend on the captions beside it.

    Args:
        model: the network; its own weights, so `model.` is the prefix of all keys.
        weights: see ldm.fetch.local; where a tokenizer may lie too. None: there is none.
        length: L, special tokens included.
        attend_to_padding: let the backbone see padding too, as Stable Diffusion does: the mask is True on it.
        chunks: C. A caption that is too long for one goes on in the next; unused ones are masked. Past the last it is cut.
        trainable: train it with the denoiser; else it is frozen and stays in evaluation mode.
        tokenizer: folder of a tokenizer of transformers; None: that of `weights`, or CLIP's byte pairs if it has none.
        pad: id of the padding token; None: the tokenizer's own, 0 without one (SD v1's is 49407, the end token).
    """

    def __init__(self, model: nn.Module, weights: str | None, length: int, attend_to_padding: bool = False,
                 chunks: int = 1, trainable: bool = False, tokenizer: str | None = None,
                 pad: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.model = model.requires_grad_(trainable)
        self.attend_to_padding, self.trainable = attend_to_padding, trainable
        folder = tokenizer or weights
        self.tokenize = _tokenizer(local(folder) if folder else None, pad, length, chunks)
        self.train(self.training)

    def train(self, mode: bool = True) -> "PretrainedText":
        return super().train(mode and self.trainable)

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        device = next(self.parameters()).device
        ids, mask = (part.to(device) for part in self.tokenize(captions))
        states, vector = self.encode(ids.flatten(0, 1), mask.flatten(0, 1))
        used = mask.sum(dim=2, keepdim=True) > len(self.tokenize.special)  # a chunk that holds some of the caption
        used[:, 0] = True
        shown = used.expand_as(mask) if self.attend_to_padding else mask & used
        return states.unflatten(0, mask.shape[:2]).flatten(1, 2), shown.flatten(1), vector[:: mask.shape[1]]

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask: (N, L), each row a chunk with its special tokens -> states (N, L, D), vector (N, V)."""
        raise NotImplementedError


class CLIPText(PretrainedText):
    """CLIP's text encoder (Radford et al. 2021) in transformers' layout, by its own causal attention.

    Args:
        weights: of it, or of a whole CLIP. Give this or `config`.
        config: arguments of transformers' CLIPTextConfig, for random weights.
        layer: whose states are the tokens: -1 for the last (SD v1), -2 for the one before it (SDXL, SD3).
        final_norm: send them through the final layer norm.
        projection: project the pooled vector into CLIP's common space (SDXL's second encoder, both of SD3).
        others: see PretrainedText.
    """

    def __init__(self, weights: str | None = None, config: Mapping[str, Any] | None = None, layer: int = -1,
                 final_norm: bool = True, projection: bool = False, length: int = 77, **others: Any) -> None:  # fmt: skip
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if projection else CLIPTextModel
        model = _of_transformers(kind.from_pretrained, lambda sizes: kind(CLIPTextConfig(**sizes)), weights, config)
        super().__init__(model, weights, length, **others)
        self.layer, self.final_norm, self.projection = layer, final_norm, projection

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(input_ids=ids, output_hidden_states=True)
        states = out.hidden_states[self.layer]
        if self.final_norm:
            states = getattr(self.model, "text_model", self.model).final_layer_norm(states)
        return states, out.text_embeds if self.projection else out.pooler_output


class OpenCLIPText(PretrainedText):
    """A text encoder of open_clip (ViT-L, H, bigG ...); the vector is in CLIP's common space.

    Args:
        weights: a folder with open_clip_config.json and open_clip_model.safetensors. Give this or `config`.
        config: open_clip's own (embed_dim, text_cfg ...), for random weights.
        layer, final_norm: see CLIPText; SD v2 takes -2 with the norm.
        others: see PretrainedText.
    """

    def __init__(self, weights: str | None = None, config: Mapping[str, Any] | None = None, layer: int = -1,
                 final_norm: bool = True, length: int = 77, **others: Any) -> None:  # fmt: skip
        from open_clip.model import _build_text_tower

        folder = _folder_or_none(weights, config)
        if folder is not None:
            config = json.loads(_file(folder, "open_clip_config.json").read_text())["model_cfg"]
        assert config is not None
        model = _build_text_tower(config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False))
        if folder is not None:
            _load_tower(model, _file(folder, "open_clip_model.safetensors"))
        super().__init__(model, weights, length, **others)
        self.layer, self.final_norm = layer, final_norm

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model.forward_intermediates(
            ids, indices=[self.layer], normalize_intermediates=self.final_norm, output_fmt="NLC"
        )
        return out["text_intermediates"][0], out["text_features"]


class TransformersText(PretrainedText):
    """Any text encoder of transformers (T5, BERT, RoBERTa ...): its last states, and their mean as the vector.

    With `attend_to_padding` the encoder itself attends to padding too, as SD3 uses T5.

    Args:
        weights: a folder in transformers' layout. Give this or `config`.
        config: {"model_type": "t5", ...}, for random weights.
        others: see PretrainedText.
    """

    def __init__(self, length: int, weights: str | None = None, config: Mapping[str, Any] | None = None,
                 **others: Any) -> None:  # fmt: skip
        from transformers import AutoConfig, AutoModelForTextEncoding

        kind = AutoModelForTextEncoding
        make = lambda sizes: kind.from_config(AutoConfig.for_model(**sizes))  # noqa: E731
        model = _of_transformers(kind.from_pretrained, make, weights, config)
        super().__init__(model, weights, length, **others)

    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen = None if self.attend_to_padding else mask.long()
        states = self.model(input_ids=ids, attention_mask=seen).last_hidden_state
        weight = mask[:, :, None].to(states.dtype)
        return states, (states * weight).sum(dim=1) / weight.sum(dim=1)


class ConcatText(nn.Module):
    """Several encoders as one.

    Those of a group are joined along the channels; the groups follow each other along the sequence, zero-padded to the
    widest. SDXL is [[L, bigG]], SD3 [[L, bigG], [T5]]. The vectors are joined.

    Args:
        groups: encoders; those of a group have the same length.
        pooled: for each encoder, in order, whether its vector is taken.
        dropout: for each encoder, the probability in [0, 1] that a training sample has its part of the null conditioning,
            drawn apart from the others' (SD3: 0.464 each); empty: none.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]], pooled: Sequence[bool],
                 dropout: Sequence[float] = ()) -> None:  # fmt: skip
        super().__init__()
        self.encoders = nn.ModuleList(encoder for group in groups for encoder in group)
        self.groups = [len(group) for group in groups]
        n = len(self.encoders)
        if len(pooled) != n or len(dropout) not in (0, n) or not all(0 <= rate <= 1 for rate in dropout):
            raise UserError(
                f"pooled={list(pooled)} and dropout={list(dropout)} for {n} text encoders: give true or false, and a "
                "probability in [0, 1], for each"
            )
        self.pooled, self.dropout = list(pooled), list(dropout)
        self.shapes: list[list[torch.Size]] = []  # of each encoder's parts; the encoders alone know

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        parts = [encoder(captions) for encoder in self.encoders]
        self.shapes = [[part.shape[1:] for part in of_one] for of_one in parts]
        return self._joined(parts)

    def drop(self, parts: Sequence[Tensor], null: Sequence[Tensor],
             random: KeyedRandom) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The parts of a `forward`, with those of the dropped encoders out of `null`: (tokens, mask, vector) each.

        Caption dropout calls it, as it works on embeddings in one place; the draws belong to the samples.
        """
        kept: list[Any] = []
        for i, (rate, shapes) in enumerate(zip(self.dropout, self.shapes, strict=True)):
            keep = random.uniform(f"text_dropout/{i}") >= rate
            kept.append(tuple(keep.view(-1, *(1,) * len(shape)).expand(-1, *shape) for shape in shapes))
        tokens, mask, vector = (torch.where(*each) for each in zip(self._joined(kept), parts, null, strict=True))
        return tokens, mask, vector

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        tokens, masks, start = [], [], 0
        for size in self.groups:
            group, start = parts[start : start + size], start + size
            tokens.append(torch.cat([part[0] for part in group], dim=2))
            masks.append(torch.stack([part[1] for part in group]).any(dim=0))
        width = max(part.shape[2] for part in tokens)
        vectors = [part[2][:, : None if taken else 0] for part, taken in zip(parts, self.pooled, strict=True)]
        tokens = [F.pad(part, (0, width - part.shape[2])) for part in tokens]
        return torch.cat(tokens, dim=1), torch.cat(masks, dim=1), torch.cat(vectors, dim=1)


def _folder_or_none(weights: str | None, config: Mapping[str, Any] | None) -> Path | None:
    if (weights is None) == (config is None):
        raise UserError("a text encoder takes either weights= or config=: give exactly one of the two")
    return None if weights is None else local(weights)


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{folder} is no folder of weights of this text encoder: it has no {name}")
    return folder / name


def _of_transformers(read: Callable[..., Any], make: Callable[[Mapping[str, Any]], nn.Module], weights: str | None,
                     config: Mapping[str, Any] | None) -> nn.Module:  # fmt: skip
    """A model of transformers in float32, its weights all read or all random."""
    folder = _folder_or_none(weights, config)
    if folder is None:
        return make(config or {})
    _file(folder, "config.json")
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with torch.device("cpu"):  # also where the rest is built without memory, on the meta device
            model, found = read(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # of safetensors, of json, of torch, of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{folder} holds no text encoder that can be read safely: {reason}") from None
    if found["missing_keys"]:
        raise UserError(f"{folder} lacks weights of this text encoder, the first is {min(found['missing_keys'])}")
    return model.float()


def _load_tower(model: nn.Module, path: Path) -> None:
    """The text tower out of a whole OpenCLIP."""
    from safetensors import SafetensorError, safe_open

    wanted = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            names = {name.removeprefix("text."): name for name in file.keys()}  # noqa: SIM118  it is no dict
            if missing := sorted(wanted.keys() - names.keys()):
                raise UserError(f"{path} lacks weights of this text encoder, the first is {missing[0]}")
            model.load_state_dict({name: file.get_tensor(names[name]).float() for name in wanted})
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this text encoder: {str(error).splitlines()[-1].strip()}") from None


def _tokenizer(folder: Path | None, pad: int | None, length: int, chunks: int) -> Tokenizer:
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        words = bpe()
        special = [words.sot_token_id, words.eot_token_id]
        return Tokenizer(words.encode, special, 0 if pad is None else pad, length, chunks)
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(caption: str) -> list[int]:
        return words(caption, add_special_tokens=False, verbose=False).input_ids

    return Tokenizer(encode, words("").input_ids, words.pad_token_id or 0 if pad is None else pad, length, chunks)
