"""Feature networks for distribution metrics: images -> one feature vector each."""

import torch.nn.functional as F
from torch import Tensor, nn


class PooledPixels(nn.Module):
    """Average colors on a coarse grid: needs no weights, sees layout and color, knows nothing of meaning.

    Args:
        side: of the grid; there are 3 * side^2 features.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.num_features = side, 3 * side * side
        self.name = f"pixels{side}"

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) uint8 -> (B, 3 * side^2) float32 in [0, 1]."""
        return F.adaptive_avg_pool2d(images.float() / 255, self.side).flatten(1)
