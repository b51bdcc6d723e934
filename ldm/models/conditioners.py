"""Conditioners: batch -> Conditioning, and the null of guidance and dropout. The other place that reads a batch.

Shapes: B or n samples, L tokens of width D, V pooled features, S spatial channels, h x w the latent's grid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.batch import Batch, to_unit
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.models.layers import sinusoidal
from ldm.models.text_pretrained import ConcatText

Latents = Callable[[Batch, KeyedRandom], Tensor]  # the first stage's `latents`
_MASKED = 2**32  # added to the seed: a masked picture's posterior draws are not those of the whole one, which it hides


class Zeros(nn.Module):
    """A null: zeros, under the mask of what they replace (SDXL's empty prompt, unCLIP's missing picture)."""

    def forward(self, cond: Conditioning) -> Conditioning:
        return cond.map(torch.zeros_like)._replace(mask=cond.mask)


class Learned(nn.Module):
    """A null: trained with the denoiser, averaged and saved as it is.

    Args:
        length, width: L and D of the tokens, all of them shown.
        vector_width: V.
    """

    def __init__(self, length: int, width: int, vector_width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, length, width) * 0.02)
        self.vector = nn.Parameter(torch.randn(1, vector_width) * 0.02)

    def forward(self, cond: Conditioning) -> Conditioning:
        tokens, vector = self.tokens.expand_as(cond.tokens), self.vector.expand_as(cond.vector)
        return cond._replace(tokens=tokens, mask=torch.ones_like(cond.mask), vector=vector)


class Conditioner(nn.Module):
    """(batch) -> Conditioning, and one `null` that training, sampling and export share.

    Args:
        to_null: conditioning -> its null: nn.Identity keeps it (the encoding of "" for text; the sample's own for what
            guidance does not take away), or Zeros, or Learned. A submodule, so that what it learns is saved with the run.
    """

    vector_width = 0  # of cond.vector; Combined needs to know
    spatial_channels = 0

    def __init__(self, to_null: nn.Module | None = None) -> None:
        super().__init__()
        self.to_null = to_null or nn.Identity()

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        """latents: the first stage's, for conditioners that need them."""
        raise NotImplementedError

    def null(self, n: int, cond: Conditioning | None = None) -> Conditioning:
        """n rows. cond: the conditioning that it stands against, whose kept parts it shares; None: for what needs none."""
        return self.to_null(self.default(n) if cond is None else cond)

    def default(self, n: int) -> Conditioning:
        """What is null without a conditioning to stand against."""
        raise AssertionError(f"{type(self).__name__}: the null is made from the conditioning; call null(n, cond)")

    def drop_parts(self, cond: Conditioning, null: Conditioning, random: KeyedRandom) -> Conditioning:
        """The conditioning with the parts that drop out on their own out of `null`; training's caption dropout calls it."""
        return cond


class TextConditioner(Conditioner):
    """Captions through a text encoder, or out of a latent cache that holds them encoded.

    Args:
        encoder: captions -> (tokens (B, L, D), mask (B, L), vector (B, V)).
        pooled: whether the backbone gets the pooled vector too (SDXL does, SD v1 and v2 do not: V is 0).
        to_null: of the encoding of "".
    """

    def __init__(self, encoder: nn.Module, pooled: bool = False, to_null: nn.Module | None = None) -> None:
        super().__init__(to_null)
        self.encoder, self.pooled = encoder, pooled
        self.empty: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}  # by where and in what

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        if "text_tokens" in batch:
            return self._cond(batch["text_tokens"].float(), batch["text_mask"], batch["text_vector"].float())
        return self._cond(*self.encoder(batch["caption"]))

    def null(self, n: int, cond: Conditioning | None = None) -> Conditioning:
        """n equal rows; encoded once, by a frozen encoder once for all: T5 would cost every step of training its time."""
        return self.to_null(self._cond(*self._empty())).expand(n)

    def _empty(self) -> tuple[Tensor, Tensor, Tensor]:
        weights = list(self.encoder.parameters())
        if not weights or any(weight.requires_grad for weight in weights):
            return self.encoder([""])
        device, dtype = weights[0].device, weights[0].dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if (device, dtype) not in self.empty:
            # validation asks too, and training cannot take what inference mode made
            with torch.inference_mode(False), torch.no_grad():
                self.empty[device, dtype] = self.encoder([""])
        return self.empty[device, dtype]

    def drop_parts(self, cond: Conditioning, null: Conditioning, random: KeyedRandom) -> Conditioning:
        """Of several encoders, each drops out on its own."""
        if not (isinstance(self.encoder, ConcatText) and self.encoder.dropout):
            return cond
        return self._cond(*self.encoder.drop(cond[:3], null[:3], random))

    def _cond(self, tokens: Tensor, mask: Tensor, vector: Tensor) -> Conditioning:
        return Conditioning(tokens, mask, vector if self.pooled else vector[:, :0])


class SizeCrop(Conditioner):
    """SDXL's micro-conditioning: original size, crop corner and target size as sinusoids (Podell et al. 2023, 2.1 and 2.2).

    What a batch does not say, sampling above all, is a whole picture of the target size. Guidance keeps it.

    Args:
        side: of the target, in pixels, where the batch has no target_size.
        width: of each of the six numbers' sinusoids; V is six times it.
    """

    def __init__(self, side: int, width: int = 256, to_null: nn.Module | None = None) -> None:
        super().__init__(to_null)
        self.width, self.vector_width = width, 6 * width
        self.register_buffer("side", torch.full((1, 2), side), persistent=False)

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        n = next(len(batch[name]) for name in ("caption", "index", "image") if name in batch)
        target = batch.get("target_size", self.side.expand(n, 2))
        original, crop = batch.get("original_size", target), batch.get("crop", torch.zeros_like(target))
        numbers = torch.cat([original, crop, target], dim=1)
        return _only(sinusoidal(numbers.flatten(), self.width).view(n, -1))

    def default(self, n: int) -> Conditioning:
        return self(Batch(caption=[""] * n))


class ClassLabel(Conditioner):
    """A vector for each class, and a learned one for none (ADM, DiT).

    Where a batch has no label, a caption is the class in text, and "" the null: so a class is asked for as a prompt.

    Args:
        classes: how many; batch["label"] is in 0 .. classes - 1.
        width: V.

    Raises:
        UserError: a caption that is no class; in training, a sample that has neither label nor caption.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(Learned(0, 0, width))
        self.vector_width = width
        self.table = nn.Embedding(classes, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        if "label" in batch:
            return _only(self.table(batch["label"]))
        if self.training and "" in batch["caption"]:
            raise UserError(
                "a sample to train on has neither label nor caption: give data/field=label, for .cls members"
            )
        rows = torch.tensor([self._row(caption) for caption in batch["caption"]], device=self.table.weight.device)
        return _only(torch.cat([self.table.weight, self.to_null.vector])[rows])

    def _row(self, caption: str) -> int:
        classes = self.table.num_embeddings
        if caption and not (caption.isdecimal() and int(caption) < classes):
            raise UserError(
                f"the prompt is {caption[:40]!r}, but this model knows classes: give 0 to {classes - 1}, or batch['label']"
            )
        return int(caption) if caption else classes

    def default(self, n: int) -> Conditioning:
        return _only(self.table.weight.new_zeros(n, self.vector_width))


class NoiseAugmentation:
    """Noises what a model is conditioned on, and tells how much, so that it learns not to trust it too far (Ho et al. 2022).

    Args:
        schedule: t in [0, 1] -> sigma, variance preserving.
        timesteps: levels, 0 .. timesteps - 1, over t in [0, 1].
        below: training draws a level under this.
        level: in evaluation and sampling, unless the batch has a noise_level.
        seed: of the draws, which belong to the samples.
    """

    def __init__(self, schedule: Callable[[Tensor], Tensor], below: int, level: int, seed: int,
                 timesteps: int = 1000) -> None:  # fmt: skip
        if not (0 <= level < timesteps and 0 < below <= timesteps):
            raise UserError(f"level={level}, below={below}: noise levels are 0 to {timesteps - 1}")
        self.schedule, self.timesteps = schedule, timesteps
        self.below, self.level, self.seed = below, level, seed

    def __call__(self, x: Tensor, batch: Batch, training: bool) -> tuple[Tensor, Tensor]:
        """x, noised and scaled to unit variance, and the level, (B,) float."""
        random = KeyedRandom(self.seed, batch["index"].to(x.device))
        level = torch.full((len(x),), self.level, device=x.device)
        if training:
            level = (random.uniform("augmentation_level") * self.below).long()
        level = batch.get("noise_level", level).to(x.device)
        sigma = self.schedule(level.double() / (self.timesteps - 1)).float().view(-1, *(1,) * (x.dim() - 1))
        return (x + sigma * random.normal("augmentation", x.shape[1:])) / (1 + sigma**2).sqrt(), level.float()


class ImageEmbedding(Conditioner):
    """A picture's embedding, noised, beside the sinusoid of its noise level: image variations (unCLIP, Ramesh et al. 2022).

    Args:
        network: (B, 3, H, W) in [-1, 1] -> (B, V / 2).
        width: V / 2.
        noise: of the embedding; the published models use the cosine schedule over all 1000 levels.
        dropout: probability in [0, 1] that a training sample has none, whatever becomes of its caption.
    """

    def __init__(self, network: nn.Module, width: int, noise: NoiseAugmentation, dropout: float = 0.0) -> None:
        super().__init__(Zeros())
        self.network, self.noise, self.dropout = network, noise, dropout
        self.width, self.vector_width = width, 2 * width

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        embedding, level = self.noise(self.network(to_unit(_image(self, batch))), batch, self.training)
        return _only(torch.cat([embedding, sinusoidal(level, self.width)], dim=1))

    def drop_parts(self, cond: Conditioning, null: Conditioning, random: KeyedRandom) -> Conditioning:
        return cond.where(random.uniform("embedding_dropout") >= self.dropout, null)


class LowResolution(Conditioner):
    """A small picture to enlarge, noised, and its noise level as the vector (Stable Diffusion's x4 upscaler; cascades).

    Args:
        factor: the small picture's sides are those of `image` divided by it; they must be the latent's.
        noise: of the small picture; the x4 upscaler trains below level 350 and samples at 20.
        channels: of the small picture.
    """

    vector_width = 1

    def __init__(self, factor: int, noise: NoiseAugmentation, channels: int = 3) -> None:
        super().__init__()
        self.factor, self.noise, self.spatial_channels = factor, noise, channels

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        small = batch.get("low_resolution")
        if small is None:
            image, scale = _image(self, batch).float(), 1 / self.factor
            small = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=True).clamp(0, 255)
        noised, level = self.noise(to_unit(small), batch, self.training)
        return _only(level[:, None], noised)


class Inpainting(Conditioner):
    """The mask (1 where to paint) and the latent of the picture without what it hides (Stable Diffusion's inpainting).

    Args:
        channels: of the latent.
        seed: of training's masks, which belong to the samples: one to four boxes, or the whole picture.
        whole: probability in [0, 1] of the whole picture (SD v2: 0.25).
    """

    def __init__(self, channels: int, seed: int, whole: float = 0.25) -> None:
        super().__init__()
        self.spatial_channels, self.seed, self.whole = 1 + channels, seed, whole

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        assert latents is not None, "Inpainting needs the first stage: conditioner(batch, first_stage.latents)"
        image = _image(self, batch)
        mask = batch["mask"] if "mask" in batch else self._draw(batch["index"], image)
        gray = torch.where(mask, 127.5, image.float())  # 0 in [-1, 1]
        z = latents(Batch(image=gray), KeyedRandom(self.seed + _MASKED, batch["index"]))
        return _only(None, torch.cat([F.interpolate(mask.float(), z.shape[2:]), z], dim=1))

    def _draw(self, index: Tensor, image: Tensor) -> Tensor:
        """(B, 1, H, W) bool."""
        random, (height, width) = KeyedRandom(self.seed, index.to(image.device)), image.shape[2:]
        boxes = random.uniform("mask_boxes", (4, 4))  # center and size, of each side
        inside = []
        for axis, extent in enumerate((height, width)):
            places = (torch.arange(extent, device=image.device) + 0.5) / extent
            inside.append((places - boxes[:, :, axis, None]).abs() < boxes[:, :, 2 + axis, None] / 4)
        drawn = torch.arange(4, device=image.device) < random.uniform("mask_count", (1,)) * 4
        mask = (inside[0][..., :, None] & inside[1][..., None, :] & drawn[..., None, None]).any(dim=1)
        return (mask | (random.uniform("mask_whole") < self.whole)[:, None, None])[:, None]


class Depth(Conditioner):
    """A depth map on the latent's grid, each scaled to [-1, 1] (Stable Diffusion v2's depth model).

    Args:
        factor: the picture's sides over the latent's.
        estimator: (B, 3, H, W) in [-1, 1] -> depth (B, 1, h, w); None: the batch brings it.
    """

    spatial_channels = 1

    def __init__(self, factor: int, estimator: nn.Module | None = None) -> None:
        super().__init__()
        self.factor, self.estimator = factor, estimator

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        depth = batch.get("depth")
        sized = depth  # as large as the picture
        if sized is None or depth is None:
            if self.estimator is None:
                raise UserError(
                    "Depth needs batch['depth'], or an estimator: train with data/field=depth, sample with --depth"
                )
            sized = _image(self, batch)
            depth = self.estimator(to_unit(sized))
        grid = [side // self.factor for side in sized.shape[2:]]
        depth = F.interpolate(depth.float(), grid, mode="bicubic")
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        return _only(None, 2 * (depth - low) / (high - low).clamp(min=1e-6) - 1)


class Combined(Conditioner):
    """Several conditioners as one: the first gives the tokens; vectors and spatial channels are joined in order.

    Args:
        first: a TextConditioner, as a rule.
        others: conditioners without tokens.
    """

    def __init__(self, first: Conditioner, others: Sequence[Conditioner]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([first, *others])
        self.vector_width = sum(part.vector_width for part in self.parts)
        self.spatial_channels = sum(part.spatial_channels for part in self.parts)

    @property
    def encoder(self) -> nn.Module | None:
        """The text encoder, which latent caches know by its weights."""
        return getattr(self.parts[0], "encoder", None)

    def forward(self, batch: Batch, latents: Latents | None = None) -> Conditioning:
        return self._joined([part(batch, latents) for part in self.parts])

    def null(self, n: int, cond: Conditioning | None = None) -> Conditioning:
        conds = [None] * len(self.parts) if cond is None else self._split(cond)
        return self._joined([part.null(n, own) for part, own in zip(self.parts, conds, strict=True)])

    def drop_parts(self, cond: Conditioning, null: Conditioning, random: KeyedRandom) -> Conditioning:
        pairs = zip(self.parts, self._split(cond), self._split(null), strict=True)
        return self._joined([part.drop_parts(own, nothing, random) for part, own, nothing in pairs])

    def _joined(self, conds: Sequence[Conditioning]) -> Conditioning:
        vector = torch.cat([cond.vector for cond in conds], dim=1)
        spatial = [cond.spatial for cond in conds if cond.spatial is not None]
        return Conditioning(conds[0].tokens, conds[0].mask, vector, torch.cat(spatial, dim=1) if spatial else None)

    def _split(self, cond: Conditioning) -> list[Conditioning]:
        """The parts that `_joined` made it of. The first's vector is as wide as the others leave it."""
        widths = [part.vector_width for part in self.parts[1:]]
        vectors = cond.vector.split([cond.vector.shape[1] - sum(widths), *widths], dim=1)
        channels = [part.spatial_channels for part in self.parts]
        spatial = [None] * len(channels) if cond.spatial is None else cond.spatial.split(channels, dim=1)
        own = [_only(vector, part if c else None) for vector, part, c in zip(vectors, spatial, channels, strict=True)]
        return [own[0]._replace(tokens=cond.tokens, mask=cond.mask), *own[1:]]


def _only(vector: Tensor | None, spatial: Tensor | None = None) -> Conditioning:
    """A conditioning without tokens."""
    given: Any = vector if vector is not None else spatial
    n, vector = len(given), given.new_zeros(len(given), 0) if vector is None else vector
    return Conditioning(given.new_zeros(n, 0, 0), given.new_zeros(n, 0).bool(), vector, spatial)


def _image(conditioner: Conditioner, batch: Batch) -> Tensor:
    if "image" not in batch:
        raise UserError(
            f"{type(conditioner).__name__} needs a picture (batch['image']): to sample, give --init; latent caches have none"
        )
    return batch["image"]
