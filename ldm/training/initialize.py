"""Starts a run from another one's weights: fine-tuning, and a pretrained model that gets more input channels."""

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from ldm.errors import UserError
from ldm.training.ema import trainable


def start_from(module: LightningModule, weights: dict[str, Tensor], source: str) -> None:
    """Copies weights into the trained parameters, which must have just these names.

    A convolution may take more channels than it did: the new ones start at zero, so that the model starts as the old one
    (Stable Diffusion's inpainting and depth models began so).

    Args:
        weights: name -> tensor, another run's average.
        source: where they are from, for errors.

    Raises:
        UserError: a name is missing or too much, or a shape differs otherwise, naming the first.
    """
    parameters = trainable(module)
    for name in sorted(parameters.keys() ^ weights.keys()):
        lacks = "lacks" if name in parameters else "has, and this model does not train,"
        raise UserError(f"init_from={source} {lacks} {name}: give the networks of that run, or of a run like this one")
    for name, parameter in parameters.items():
        weight = weights[name]
        old, new = tuple(weight.shape), tuple(parameter.shape)
        if len(new) == 4 and old[:1] + old[2:] == new[:1] + new[2:] and old[1] < new[1]:
            weight = torch.cat([weight, weight.new_zeros(new[0], new[1] - old[1], *new[2:])], dim=1)
        elif old != new:
            raise UserError(f"init_from={source} has {name} as {old}, this model as {new}: they are of different sizes")
        parameter.copy_(weight)
