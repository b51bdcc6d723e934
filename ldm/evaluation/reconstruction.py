"""Metrics of a first stage: how well pictures come back, and what its latents are like."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.utilities import dim_zero_cat

from ldm.batch import to_unit
from ldm.evaluation.measures import mean_of

ACTIVE = 0.01  # variance of a latent element's mean over pictures, above which it is active (Burda et al. 2016)


class PictureMean(Metric):
    """The mean over pictures of one or more numbers a picture, with its interval; `samples` has the numbers themselves."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("each", default=[], dist_reduce_fx="cat")
        self.samples: dict[str, Tensor] = {}

    def measure(self, images: Tensor, reference: Tensor) -> list[Tensor]:
        """(B,) for each name; images, reference: (B, 3, H, W) uint8."""
        raise NotImplementedError

    def update(self, images: Tensor, captions: Sequence[str], reference: Tensor) -> None:
        self.each.append(torch.stack(self.measure(images, reference), dim=1).double().cpu())

    def compute(self) -> dict[str, float]:
        self.samples = dict(zip(self.names, dim_zero_cat(self.each).unbind(dim=1), strict=True))
        return {key: value for name, each in self.samples.items() for key, value in mean_of(name, each).items()}


class ReconstructionQuality(PictureMean):
    """`psnr` in dB and `ssim`, each the mean over pictures, of 8-bit pixels.

    A picture's psnr is at most 100: of one without any error it is infinite, and so would the mean be.
    """

    def __init__(self) -> None:
        super().__init__(("psnr", "ssim"))

    def measure(self, images: Tensor, reference: Tensor) -> list[Tensor]:
        a, b = images.float(), reference.to(images.device).float()
        psnr = peak_signal_noise_ratio(a, b, data_range=255.0, dim=(1, 2, 3), reduction="none")
        ssim: Any = structural_similarity_index_measure(a, b, data_range=255.0, reduction="none")
        return [psnr.clamp(max=100.0), ssim]


class PerceptualQuality(PictureMean):
    """The mean perceptual distance, under the given name.

    Args:
        network: (a, b) in [-1, 1] -> (B,); see models/perceptual.py.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__((name,))
        self.network = network

    def measure(self, images: Tensor, reference: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [self.network(to_unit(images), to_unit(reference.to(images.device)))]


class LatentStatistics(Metric):
    """`latent/kl` in nats per latent element, `latent/active` (the share of elements that are active), and
    `latent/mean/<c>`, `latent/std/<c>` of posterior samples by channel, over the reference pictures.

    Args:
        encode: pictures (B, 3, H, W) in [-1, 1] -> posterior with `mean`, `logvar` (B, z, h, w) and `kl()` (B,).
    """

    def __init__(self, encode: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.encode = encode
        for name in ("count", "mean", "square", "variance", "kl"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor, captions: Sequence[str], reference: Tensor) -> None:
        posterior = self.encode(to_unit(reference.to(images.device)))
        mean, logvar = posterior.mean.double(), posterior.logvar.double()
        maps = {"mean": mean, "square": mean.square(), "variance": logvar.exp()}  # (B, z, h, w)
        sums = {name: each.sum(dim=0) for name, each in maps.items()}
        for name, value in {"count": len(mean), **sums, "kl": posterior.kl().double().sum()}.items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, float]:
        mean, square, variance = (part / self.count for part in (self.mean, self.square, self.variance))
        active = (square - mean.square() > ACTIVE).double().mean()
        by_channel = mean.mean(dim=(1, 2))
        std = ((square + variance).mean(dim=(1, 2)) - by_channel.square()).sqrt()
        values = {"latent/kl": float(self.kl / self.count / mean.numel()), "latent/active": float(active)}
        for name, part in (("mean", by_channel), ("std", std)):
            values |= {f"latent/{name}/{c}": value for c, value in enumerate(part.tolist())}
        return values
