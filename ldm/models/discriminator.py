"""The patch discriminator (Isola et al. 2017) that the published first stages train against."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ldm.errors import UserError

Norm = Callable[[int], nn.Module]  # channels -> a layer


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for normalizations, as pix2pix and CompVis begin."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w), one for each patch: positive for a real one.

    Args:
        channels: of the first layer; they double per layer, up to eight times.
        layers: strided ones. 3 make patches of 70 pixels.
        batch_norm: after each layer but the first and the last, as published. Its statistics are the micro-batch's.
        spectral: spectral normalization of every convolution (Miyato et al. 2018).

    Raises:
        UserError: no layer, or both normalizations.
    """

    def __init__(self, channels: int = 64, layers: int = 3, batch_norm: bool = True, spectral: bool = False) -> None:
        super().__init__()
        if layers < 1 or channels < 1 or (batch_norm and spectral):
            raise UserError(
                f"discriminator: {layers} layers of {channels} channels, batch_norm={batch_norm}, spectral={spectral}; give "
                "at least one layer, and one normalization at most"
            )
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            # a bias would be taken off again by the normalization
            blocks.append(nn.Conv2d(widths[i], widths[i + 1], 4, stride, padding=1, bias=not batch_norm))
            blocks += [nn.BatchNorm2d(widths[i + 1])] if batch_norm else []
            blocks.append(nn.LeakyReLU(0.2))
        blocks.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*blocks)
        self.apply(init_weights)
        if spectral:
            for module in self.main:
                if isinstance(module, nn.Conv2d):
                    spectral_norm(module)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)
