"""Random draws keyed by (seed, sample index, purpose), the same on any device, rank, batch size and moment.

A draw is a hash of its key (SplitMix64: Steele et al., "Fast splittable pseudorandom number generators", 2014), so there
is no generator state to save, to seed per rank or to restore: noise, sigma, caption dropout, crop and flip of a sample are
functions of the sample alone.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK = 2**64 - 1
_BITS = 26  # uniform draws are (k + 1/2) / 2^26


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # torch shifts int64 arithmetically: mask the sign bits


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64 tensors; multiplication wraps, as it must."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(seed: int, index: int, purpose: str) -> float:
    """KeyedRandom(seed, [index]).uniform(purpose) without a tensor: for readers, which draw for one sample at a time."""
    base = _mix_integer(index * _GOLDEN + _key(seed, purpose))
    bits = _mix_integer(base + _GOLDEN) >> (64 - _BITS)
    return (bits + 0.5) / 2**_BITS


def _mix_integer(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


class KeyedRandom:
    """Draws for a batch of samples.

    Args:
        seed: the run's seed.
        index: (B,) int64, which sample each row is: its position in the run's sample sequence, or a prompt's index.

    Every method takes a `purpose` ("noise", "caption_dropout", ...): two purposes never share a draw, and asking twice for
    the same purpose and shape gives the same numbers.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        self.seed = seed
        self.index = index.to(torch.int64)

    def _hash(self, purpose: str, n: int) -> Tensor:
        """(B, n) int64, uniform over all 64-bit integers."""
        device = self.index.device
        base = _mix(self.index * _GOLDEN + _key(self.seed, purpose))
        return _mix(base[:, None] + torch.arange(1, n + 1, device=device) * _GOLDEN)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float64, uniform on the open interval (0, 1)."""
        bits = _shift_right(self._hash(purpose, math.prod(shape)), 64 - _BITS)
        return ((bits.double() + 0.5) / 2**_BITS).reshape(-1, *shape)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, standard normal (Box-Muller, both branches).

        Computed in float64 and rounded once: the last bit of a vectorized float32 cosine depends on where in memory an
        element lies, and a sample's noise must not depend on its neighbors.
        """
        n = math.prod(shape)
        bits = self._hash(purpose, (n + 1) // 2)
        radius = (_shift_right(bits, 64 - _BITS).double() + 0.5).div_(2**_BITS).log_().mul_(-2).sqrt_()
        angle = (bits & ((1 << _BITS) - 1)).double().mul_(2 * math.pi / 2**_BITS)
        draws = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :n]
        return draws.float().reshape(-1, *shape)
