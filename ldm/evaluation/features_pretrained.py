"""Feature networks of transformers and open_clip: CLIP, which reads captions too, and DINOv2. Weights come from local files.

Shapes: B images or captions, D features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.evaluation.features import IMAGENET_MEAN, IMAGENET_STD, FeatureNetwork, normalized, pillow_bicubic
from ldm.fetch import local

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIP(FeatureNetwork):
    """A CLIP in transformers' layout: embeddings of pictures and captions (cut at 77 tokens) in their common space.

    Args:
        weights: see ldm.fetch.local; its last part is the name.

    Raises:
        UserError: they are missing, with the command that fetches them, or are others.
    """

    def __init__(self, weights: str = "clip_l") -> None:
        from open_clip import SimpleTokenizer
        from transformers import CLIPModel

        network = _read(CLIPModel.from_pretrained, weights)
        super().__init__(_name(weights), network.config.vision_config.image_size, pillow_bicubic)
        self.network, self.tokenize = network, SimpleTokenizer()

    def encode(self, pixels: Tensor) -> Tensor:
        seen = self.network.vision_model(pixel_values=normalized(pixels, CLIP_MEAN, CLIP_STD)).pooler_output
        return self.network.visual_projection(seen)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """(B, D)."""
        read = self.network.text_model(input_ids=self.tokenize(list(captions)).to(self.device)).pooler_output
        return self.network.text_projection(read).float().cpu()


class OpenCLIP(FeatureNetwork):
    """The same of open_clip, with its own tokenizer, mean and deviation.

    Args:
        weights: a folder with open_clip_config.json and open_clip_model.safetensors: see ldm.fetch.local.

    Raises:
        UserError: as CLIP.
    """

    def __init__(self, weights: str = "openclip_h") -> None:
        import open_clip

        place = f"local-dir:{local(weights)}"
        network = _quietly(lambda: open_clip.create_model(place, require_pretrained=True), weights)
        shape = open_clip.get_model_preprocess_cfg(network)
        side = shape["size"] if isinstance(shape["size"], int) else shape["size"][0]
        super().__init__(_name(weights), side, pillow_bicubic)
        self.network = network.requires_grad_(False).eval()
        self.mean, self.std = shape["mean"], shape["std"]
        self.tokenize = _quietly(lambda: open_clip.get_tokenizer(place), weights)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode_image(normalized(pixels, self.mean, self.std))

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """(B, D)."""
        return self.network.encode_text(self.tokenize(list(captions)).to(self.device)).float().cpu()


class DINOv2(FeatureNetwork):
    """The class token after the last norm (Oquab et al. 2023), whose Fréchet distance judges as people do better than
    Inception's (Stein et al. 2023, who use ViT-L).

    Args:
        weights: in transformers' layout: see ldm.fetch.local.

    Raises:
        UserError: as CLIP.
    """

    def __init__(self, weights: str = "dinov2") -> None:
        from transformers import Dinov2Model

        super().__init__(_name(weights), 224, pillow_bicubic)
        self.network = _read(Dinov2Model.from_pretrained, weights)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=normalized(pixels, IMAGENET_MEAN, IMAGENET_STD)).pooler_output


def _name(weights: str) -> str:
    """A name in KNOWN, a folder's own, or a repository's."""
    return weights.partition("@")[0].rstrip("/").rpartition("/")[2]


def _read(from_pretrained: Callable[..., Any], weights: str) -> nn.Module:
    folder = local(weights)
    how = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    network, found = _quietly(lambda: from_pretrained(folder, **how), weights)
    if found["missing_keys"]:
        raise UserError(f"{folder} lacks weights of this network, the first is {min(found['missing_keys'])}")
    return network.float().requires_grad_(False).eval()


def _quietly(read: Callable[[], Any], weights: str) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return read()
    except Exception as error:  # of the libraries, of safetensors, of json
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the weights {weights} in {local(weights)} cannot be read safely: {reason}") from None
