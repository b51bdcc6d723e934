"""The noise that stochastic solvers add: increments of one Brownian path per sample, keyed by the sample."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.keyed_random import KeyedRandom

Noise = Callable[[float, float], Tensor]  # (sigma, sigma_next) -> (B, C, H, W) standard normal, for this step down
DEPTH = 20  # halvings of the unit interval: finer than any step of a solver


class BrownianPath:
    """W(σ) − W(σ_next) over its standard deviation: a virtual Brownian tree (Li et al. 2020, "Scalable gradients for SDEs").

    Steps that do not overlap get independent noise, and the noise of a long step is made of that of the short steps
    inside it: with more steps a stochastic solver converges to one image, not to another one each time. The path is a
    function of (seed, sample index) alone. Its time is the flow time σ/(1+σ), in [0, 1).

    Args:
        random: of the batch.
        shape: (C, H, W) of one sample.
    """

    def __init__(self, random: KeyedRandom, shape: Sequence[int]) -> None:
        self.random, self.shape = random, tuple(shape)
        self._last: tuple[float, Tensor] | None = None  # the step before ended where this one begins

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """sigma > sigma_next >= 0. Returns (B, C, H, W) float32."""
        start, end = sigma / (1 + sigma), sigma_next / (1 + sigma_next)
        high = self._last[1] if self._last and self._last[0] == start else self._at(start)
        low = self._at(end)
        self._last = end, low
        return ((high - low) / (start - end) ** 0.5).float()

    def _at(self, time: float) -> Tensor:
        """W(time), (B, C, H, W) float64: halve the interval around `time`, each middle a Brownian bridge."""
        low, high, node = 0.0, 1.0, 1
        at_low, at_high = torch.zeros((), dtype=torch.float64), self._draw("end")
        for _ in range(DEPTH):
            middle = (low + high) / 2
            at_middle = (at_low + at_high) / 2 + ((high - low) / 4) ** 0.5 * self._draw(node)
            if time < middle:
                high, at_high, node = middle, at_middle, 2 * node
            else:
                low, at_low, node = middle, at_middle, 2 * node + 1
        return torch.lerp(at_low.to(at_high), at_high, (time - low) / (high - low))

    def _draw(self, node: int | str) -> Tensor:
        return self.random.normal(f"brownian {node}", self.shape).double()
