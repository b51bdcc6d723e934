"""Feature networks for distribution metrics: uint8 images -> one feature vector each.

Shapes: B images of H x W pixels, D features, K classes. Features are float32 on the CPU, whatever the network runs on.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.evaluation.protocol import digest
from ldm.fetch import local

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TOGETHER = 32  # pictures that a network sees at once: on a CPU, larger ones spend their time on getting memory
Resize = Callable[[Tensor, int], Tensor]  # (B, 3, H, W) uint8 on the CPU, side -> (B, 3, side, side) float32 in 0..255


def pillow_bicubic(images: Tensor, side: int) -> Tensor:
    """Antialiased, rounded to uint8 between: what CLIP and DINOv2 were trained with."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).float()


def clean(images: Tensor, side: int) -> Tensor:
    """Antialiased bicubic without rounding: clean-fid's (Parmar et al. 2022)."""
    return F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255)


def bilinear(images: Tensor, side: int) -> Tensor:
    """Not antialiased: pytorch-fid's, and so MLPerf's. It costs points: compare only with the same."""
    return F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False)


def tensorflow_bilinear(images: Tensor, side: int) -> Tensor:
    """Not antialiased, corners as in TensorFlow 1: the original FID's and torch-fidelity's."""
    x = images.float()
    for axis in (3, 2):
        size = x.shape[axis]
        place = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side)
        low = place.long()
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = a + (b - a) * (place - low).view([-1 if i == axis else 1 for i in range(4)])
    return x


def area(images: Tensor, side: int) -> Tensor:
    """The mean over equal cells."""
    return F.adaptive_avg_pool2d(images.float(), side)


class FeatureNetwork(nn.Module):
    """(B, 3, H, W) uint8 -> (B, D). A subclass gives `encode`: (B, 3, side, side) float32 in 0..255 -> (B, D).

    Args:
        name: what its scores are called after.
        side: pixels that it looks at.
        resize: to that side.
    """

    def __init__(self, name: str, side: int, resize: Resize) -> None:
        super().__init__()
        self.name, self.side, self.resize = name, side, resize
        self.resize_name = getattr(resize, "func", resize).__name__  # a config gives a partial

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Raises UserError for anything but uint8: floats of an unknown range give features of nothing."""
        if images.dtype != torch.uint8:
            raise UserError(
                f"features are of uint8 pictures in 0..255, these are {images.dtype} in {float(images.min()):.3g}.."
                f"{float(images.max()):.3g}: convert them with ldm.batch.to_uint8 from [-1, 1]"
            )
        parts = (self.resize(part, self.side).to(self.device) for part in images.cpu().split(_TOGETHER))
        return torch.cat([self.encode(part).float().cpu() for part in parts])

    def encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def identity(self) -> dict[str, Any]:
        """What the features depend on, as plain data."""
        state = sorted(self.state_dict().items())
        weights = digest(name.encode() + value.cpu().contiguous().numpy().tobytes() for name, value in state)
        return {"digest": weights, "side": self.side, "resize": self.resize_name}


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """0..255 -> what a network with this mean and deviation, of pictures in [0, 1], expects."""
    center, scale = (torch.tensor(part, device=pixels.device).view(1, 3, 1, 1) for part in (mean, std))
    return (pixels / 255 - center) / scale


class PooledPixels(FeatureNetwork):
    """Average colors on a coarse grid: needs no weights, sees layout and color, knows nothing of meaning.

    Args:
        side: of the grid; there are 3 * side^2 features.
    """

    def __init__(self, side: int) -> None:
        super().__init__(f"pixels{side}", side, area)

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1) / 255


class PooledStages(FeatureNetwork):
    """The average over positions of what stages applied one after another give: EfficientNet-Lite0, which comes with pip.

    Args:
        name, side: see FeatureNetwork.
        stages: trained on ImageNet's mean and deviation.
    """

    def __init__(self, name: str, side: int, stages: Iterable[nn.Module]) -> None:
        super().__init__(name, side, pillow_bicubic)
        self.stages = nn.Sequential(*stages).requires_grad_(False).eval()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.stages(normalized(pixels, IMAGENET_MEAN, IMAGENET_STD)).mean(dim=(2, 3))


class Inception(FeatureNetwork):
    """FID's Inception v3 (2015-12-05, TensorFlow's): 2048 features and 1008 classes.

    torchvision's network, with TensorFlow's pooling: padding does not count, and the last block takes the maximum.

    Args:
        weights: see ldm.fetch.local; torch-fidelity's file.
        resize: the original's, unless clean-fid's or pytorch-fid's numbers are wanted.

    Raises:
        UserError: the weights are missing, with the command that fetches them, or are others.
    """

    def __init__(self, weights: str = "inception", resize: Resize = tensorflow_bilinear) -> None:
        from torchvision.models import inception as parts  # here: it costs a second at the start of every command

        super().__init__("inception", 299, resize)
        self.name += {"tensorflow_bilinear": "", "bilinear": "_pytorch"}.get(self.resize_name, f"_{self.resize_name}")
        path = local(weights)
        a, c, e = (_pooled_as_tensorflow(kind) for kind in (parts.InceptionA, parts.InceptionC, parts.InceptionE))
        blocks = [parts.BasicConv2d, a, parts.InceptionB, c, parts.InceptionD, e, parts.InceptionAux]
        network = parts.Inception3(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # of the reader, or of the names and shapes
            raise UserError(f"{path} holds no weights of FID's Inception v3: {str(error).splitlines()[0]}") from None
        self.classes, network.fc = network.fc, nn.Identity()
        self.network = network
        self.requires_grad_(False).eval()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.network((pixels - 128) / 128)

    def logits(self, features: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008), without the bias, as the Inception score has it."""
        return (features.to(self.device) @ self.classes.weight.T).cpu()


def _pooled_as_tensorflow(kind: Any) -> type[nn.Module]:
    class Block(kind):
        def _forward(self, x: Tensor) -> list[Tensor]:
            *others, _ = super()._forward(x)
            if x.shape[1] == 2048:
                pooled = F.max_pool2d(x, 3, stride=1, padding=1)
            else:
                pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            return [*others, self.branch_pool(pooled)]

    return Block
