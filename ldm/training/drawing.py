"""Pictures for a prompt: what `ldm sample` does, and what a script calls.

Shapes: pictures (B, 3, H, W) uint8; masks (H, W) in [0, 1], 1 where to paint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ldm.batch import Batch, to_uint8
from ldm.diffusion.editing import keep, start_from
from ldm.diffusion.noise import BrownianPath
from ldm.diffusion.sampling import Sampling
from ldm.diffusion.solvers import Callback
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.training.latent_diffusion import LatentDiffusionModule


@dataclass(frozen=True)
class Request:
    """What to draw.

    Args:
        prompt, negative: captions; "" is the null.
        side: of the pictures, in pixels.
        count: pictures, numbered from `first`; picture i is a function of (seed, i) and the rest alone.
        init: a picture to start from, cropped to a square; strength: share of the steps taken from it, in (0, 1].
        mask: with init: white where to paint, black where to keep.
        depth: for a model that is conditioned on it: a gray picture, lighter where training's maps have larger numbers.
    """

    prompt: str
    side: int
    negative: str = ""
    count: int = 4
    first: int = 0
    seed: int = 0
    init: Path | None = None
    strength: float = 0.7
    mask: Path | None = None
    depth: Path | None = None


def of_stage_two(module: object) -> LatentDiffusionModule:
    """The same module. Raises UserError for an autoencoder's."""
    if not isinstance(module, LatentDiffusionModule):
        raise UserError(f"this is a run of {type(module).__name__}, which draws nothing: give one of stage two")
    return module


@torch.no_grad()
def draw(
    module: LatentDiffusionModule, sampling: Sampling, request: Request, callback: Callback | None = None
) -> Tensor:
    """(count, 3, H, W) uint8. Raises UserError for a picture that cannot be read or does not fit, or a bad number."""
    if request.count < 1 or (request.mask and not request.init):
        raise UserError(
            f"count is {request.count}, mask {request.mask}: give a count of at least 1, and a mask only with an init"
        )
    device, stage = module.device, module.first_stage
    index = torch.arange(request.first, request.first + request.count, device=device)
    random = KeyedRandom(request.seed, index)
    batch = Batch(caption=[request.prompt] * request.count, index=index)

    def given(path: Path, mode: str) -> Tensor:
        return _square(path, mode, request.side).to(device).expand(request.count, -1, -1, -1)

    painted = torch.empty(0)
    if request.init:
        batch["image"] = given(request.init, "RGB")
        painted = given(request.mask, "L") / 255 if request.mask else torch.ones_like(batch["image"][:, :1])
        batch["mask"] = painted > 0.5  # for models that are trained to inpaint
    if request.depth:
        batch["depth"] = given(request.depth, "F")
    cond = module.conditioner(batch, stage.latents)
    null = module.conditioner.null(request.count, cond)
    if request.negative:
        null = module.conditioner({**batch, "caption": [request.negative] * request.count}, stage.latents)
    if not request.init:
        shape = stage.latent_shape(request.side)
        return to_uint8(stage.decode(sampling(module.denoiser, cond, null, random, shape, callback)))
    z = stage.latents(batch, random)
    x, sigmas = start_from(z, random.normal("sampling", z.shape[1:]), sampling.sigmas(), request.strength)
    cond, null = (module.denoiser.prepared(each) for each in (cond, null))
    denoise = sampling.guidance(module.denoiser, cond, null)
    if request.mask:
        denoise = keep(denoise, z, F.interpolate(painted, size=z.shape[2:], mode="area"))  # as far as its pixels are
    out = sampling.solver(denoise, x, sigmas, BrownianPath(random, z.shape[1:]), callback)
    return to_uint8(stage.decode(out))


def parameters(run: str, step: int, sampling: dict[str, Any], request: Request) -> dict[str, Any]:
    """What made a picture, as `save` puts it into the file; sampling: as config.sampling tells it."""
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(request).items()}
    return {"run": run, "step": step, "sampling": sampling, **told}


def save(pictures: Tensor, folder: Path, name: str, first: int, parameters: dict[str, Any]) -> list[Path]:
    """PNGs with the parameters inside, as JSON under `ldm`, and as text under `parameters`, where web UIs look."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, picture in enumerate(pictures.cpu(), first):
        told = parameters | {"index": i}
        info = PngImagePlugin.PngInfo()
        info.add_itxt("ldm", json.dumps(told))
        info.add_itxt(
            "parameters", "\n".join(f"{key}: {value}" for key, value in told.items() if value not in (None, ""))
        )
        paths.append(folder / f"{name}_{i:04d}.png")
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(paths[-1], pnginfo=info)
    return paths


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from None


def _square(path: Path, mode: str, side: int) -> Tensor:
    """(1, C, side, side) uint8, or float in mode F: resized, the longer side cropped at the center."""
    image = _open(path).convert(mode)
    scale = side / min(image.size)
    image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    pixels = np.array(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.reshape(side, side, -1)).permute(2, 0, 1)[None]
