"""Perceptual distances: LPIPS (Zhang et al. 2018) on a local file of weights, and the same distance on other features."""

from collections.abc import Iterable, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.models.efficientnet import MEAN, STD, load

TAPS = (3, 8, 15, 22, 29)  # of VGG16's features: the last ReLU before each pooling, and of the last stage


class PerceptualDistance(nn.Module):
    """(a, b), both (B, 3, H, W) in [-1, 1] -> (B,): how differently a frozen network sees two pictures.

    At each of the network's feature maps, the vectors are normalized to length 1; the squared difference is weighted by
    channel, summed over channels and averaged over positions; the maps are summed (Zhang et al. 2018, eq. 1).

    Args:
        layers: applied one after another; the output of each is a feature map.
        heads: per map, the channels' weights (C,), not negative; None: 1 / C each, which no human judgement calibrated.
        mean, std: per channel, of the pictures (in [-1, 1]) that the network expects.
    """

    def __init__(
        self, layers: Iterable[nn.Module], heads: Sequence[Tensor] | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for i, head in enumerate(heads or ()):
            self.register_buffer(f"head_{i}", head.reshape(-1, 1, 1).float())
        self.calibrated = heads is not None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        return super().train(False)  # frozen: whatever the trainer says

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        # apart, and the second without a gradient where it needs none: pictures are data, reconstructions are not
        a, b = (a - self.mean) / self.std, (b - self.mean) / self.std
        distance = torch.zeros(len(a), device=a.device)
        for i, layer in enumerate(self.layers):
            a, b = layer(a), layer(b)
            squares = (_unit(a) - _unit(b)).square()
            weight = getattr(self, f"head_{i}") if self.calibrated else 1 / a.shape[1]
            distance = distance + (squares * weight).sum(dim=1).mean(dim=(1, 2)).float()
        return distance


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def lpips(weights: str) -> PerceptualDistance:
    """LPIPS 0.1 on VGG16, the perceptual loss of the published first stages. Its linear heads come with torchmetrics.

    Args:
        weights: torchvision's VGG16 state dict (`ldm fetch vgg16`), of which `features.*` is read.

    Raises:
        UserError: the file is missing, with the command that fetches it; or it holds something else.
    """
    from torchvision.models import vgg16  # here: it costs a second at the start of every command

    path = Path(weights)
    if not path.is_file():
        raise UserError(
            f"LPIPS needs VGG16's weights in {path}: fetch them where there is a network with `ldm fetch vgg16 {path}`, or "
            "choose model/perceptual=efficientnet (comes with pip) or model/perceptual=none"
        )
    features = vgg16(weights=None).features
    state = _read(path)
    state = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    wanted = features.state_dict()
    wrong = [k for k, v in wanted.items() if k not in state or state[k].shape != v.shape]
    if wrong or state.keys() - wanted.keys():
        name = (wrong or sorted(state.keys() - wanted.keys()))[0]
        raise UserError(f"{path} is not torchvision's VGG16: features.{name} is missing, of another shape, or too much")
    features.load_state_dict(state)
    for layer in features:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # it would overwrite the features that are compared
    starts = (0, *(tap + 1 for tap in TAPS))
    layers = [features[start : tap + 1] for start, tap in zip(starts, TAPS, strict=False)]
    with as_file(files("torchmetrics") / "functional/image/lpips_models/vgg.pth") as heads_path:
        heads = _read(heads_path)
    # LPIPS' own constants, of pictures in [-1, 1]
    return PerceptualDistance(
        layers, [heads[f"lin{i}.model.1.weight"] for i in range(5)], (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no file of weights that can be read safely: {reason}") from None


def efficientnet() -> PerceptualDistance:
    """EfficientNet-Lite0's features on ImageNet, which come with pip: the `features` extra. Not calibrated, not LPIPS.

    Raises:
        UserError: the package is not installed.
    """
    return PerceptualDistance(load(), None, MEAN, STD)
