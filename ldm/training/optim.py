"""Learning-rate schedules: step -> factor on the optimizer's own rate. Plain callables for LambdaLR."""

import math


class Warmup:
    """Linear from 0 to 1 over `warmup` steps, then constant (Stable Diffusion's)."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / max(self.warmup, 1))


class WarmupCosine(Warmup):
    """Linear from 0 to 1 over `warmup` steps, then half a cosine down to `floor` at `total` steps."""

    def __init__(self, warmup: int, total: int, floor: float = 0.0) -> None:
        super().__init__(warmup)
        self.total, self.floor = total, floor

    def __call__(self, step: int) -> float:
        progress = min(1.0, max(0.0, (step - self.warmup) / max(self.total - self.warmup, 1)))
        decay = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return super().__call__(step) * decay
