import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from ldm.training.optim import Warmup, WarmupCosine


def test_warmup_is_linear_then_constant():
    assert [Warmup(4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Warmup(0)(0) == 1


def test_warmup_cosine_falls_to_the_floor():
    schedule = WarmupCosine(warmup=10, total=110, floor=0.1)
    assert [schedule(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1, 1]
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule(110) == schedule(500) == pytest.approx(0.1)
    values = [schedule(step) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_a_run_shorter_than_its_warmup_stays_finite():
    assert [WarmupCosine(10, 5)(step) for step in (0, 4)] == [0.1, 0.5]


def test_an_optimizer_follows_it():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, rates = LambdaLR(optimizer, Warmup(3)), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2 / 3, 4 / 3, 2, 2])
