"""Guidance: closes over a denoiser and what it is conditioned on, and hands the solver a plain DenoiseFn.

A linear rule on D is the same rule on ε, v and flow: each is affine in D, with the same coefficients in every branch.
`Guidance(scale, **rules)` is classifier-free guidance and then each rule in turn. A rule is a function of the x0_hat
before it, which it may leave uncomputed, and of the `Step`, which evaluates the denoiser under any conditioning.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import DenoiseFn, Denoiser
from ldm.errors import UserError


@dataclass(frozen=True)
class Step:
    """One evaluation that a solver asks for.

    Attributes:
        x: (B, C, H, W). sigma: ().
        denoiser, cond, null: what guidance was given; cond and null have B rows.
        both: null's rows, then cond's, put together once for all steps; None where classifier-free guidance needs no both.
        memory: what a rule remembers from the steps before, by its own name; empty at the start of a sample.
    """

    x: Tensor
    sigma: Tensor
    denoiser: Denoiser
    cond: Conditioning
    null: Conditioning
    both: Conditioning | None
    memory: dict[str, Tensor]
    _known: dict[int, Tensor] = field(default_factory=dict)

    def predict(self, *conds: Conditioning) -> tuple[Tensor, ...]:
        """x0_hat (B, C, H, W) under each, those not known yet in one batched call."""
        new = [c for i, c in enumerate(conds) if id(c) not in self._known and all(c is not d for d in conds[:i])]
        if new:
            usual = len(new) == 2 and new[0] is self.null and new[1] is self.cond
            together = self.both if usual and self.both is not None else reduce(Conditioning.cat, new)
            out = self.denoiser(self.x, self.sigma, together).chunk(len(new))
            self._known.update(zip(map(id, new), out, strict=True))
        return tuple(self._known[id(c)] for c in conds)

    def at(self, x: Tensor) -> "Step":
        """The same step at another x."""
        return replace(self, x=x, _known={})


Prediction = Callable[[Step], Tensor]  # x0_hat, (B, C, H, W)
Rule = Callable[[Prediction, Step], Tensor]  # (what comes before, step) -> x0_hat


class Guidance:
    """Classifier-free guidance: D_null + scale·(D_cond − D_null) (Ho & Salimans 2022, equation 6, whose w is scale − 1).

    Scale 1 is without guidance and 0 is unconditional, each one call of B rows; any other scale is one call of 2B rows.
    A negative prompt is a `null` made of it.

    Args:
        scale: finite and >= 0.
        rules: applied to the result in this order; their names are free.

    Raises:
        UserError: when scale is negative or not finite.
    """

    def __init__(self, scale: float = 1.0, **rules: Rule) -> None:
        if not 0 <= scale < math.inf:
            raise UserError(f"guidance scale is {scale}; give a number >= 0 (1 is without guidance)")
        self.scale, self.rules = scale, rules

    def __call__(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """cond: B rows; null: 1 row or B rows. The DenoiseFn takes x (B, C, H, W) and sigma ()."""
        null = null.expand(len(cond.tokens))
        both = None if self.scale in (0, 1) else null.cat(cond)
        memory: dict[str, Tensor] = {}
        predict: Prediction = self._classifier_free
        for rule in self.rules.values():
            predict = _after(rule, predict)
        return lambda x, sigma: predict(Step(x, sigma, denoiser, cond, null, both, memory))

    def _classifier_free(self, step: Step) -> Tensor:
        if self.scale in (0, 1):
            return step.predict(step.cond if self.scale == 1 else step.null)[0]
        x0_null, x0_cond = step.predict(step.null, step.cond)
        return x0_null + self.scale * (x0_cond - x0_null)

    def __repr__(self) -> str:
        return f"Guidance({', '.join([f'scale={self.scale}', *(f'{k}={v}' for k, v in self.rules.items())])})"


def _after(rule: Rule, before: Prediction) -> Prediction:
    return lambda step: rule(before, step)


@dataclass(frozen=True)
class Interval:
    """What comes before it only for sigma_min < σ <= sigma_max, else unguided (Kynkäänniemi et al. 2024).

    Costs one call of B rows outside the interval. Raises UserError unless 0 <= sigma_min < sigma_max.
    """

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < self.sigma_max:
            raise UserError(f"{self}: give 0 <= sigma_min < sigma_max")

    def __call__(self, before: Prediction, step: Step) -> Tensor:
        inside = self.sigma_min < float(step.sigma) <= self.sigma_max  # sigma is on the host: nothing waits
        return before(step) if inside else step.predict(step.cond)[0]


@dataclass(frozen=True)
class Rescale:
    """The guided x0_hat with D_cond's standard deviation, mixed in by `factor` (Lin et al. 2024, equations 15 and 16).

    Raises UserError unless factor is in [0, 1] (the paper uses 0.7).
    """

    factor: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise UserError(f"{self}: factor is a share: give a number in [0, 1]")

    def __call__(self, before: Prediction, step: Step) -> Tensor:
        guided, (x0_cond,) = before(step), step.predict(step.cond)
        ratio = x0_cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        return guided * (self.factor * ratio + 1 - self.factor)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clips x0_hat at a percentile s of its magnitude and divides by s/limit (Imagen: Saharia et al. 2022, section 2.3).

    For pixels in [-1, 1] limit is 1; normalized latents reach about 3. s is never below `limit`.
    Raises UserError unless percentile is in (0, 1] and limit > 0.
    """

    percentile: float = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.percentile <= 1 and 0 < self.limit < math.inf):
            raise UserError(f"{self}: give percentile in (0, 1] and limit > 0")

    def __call__(self, before: Prediction, step: Step) -> Tensor:
        x0_hat = before(step)
        s = x0_hat.flatten(1).abs().quantile(self.percentile, dim=1).clamp(min=self.limit).view(-1, 1, 1, 1)
        return x0_hat.clamp(-s, s) * (self.limit / s)


@dataclass(frozen=True)
class Autoguidance:
    """D_weak + scale·(x0_hat − D_weak): away from a smaller or less trained denoiser (Karras et al. 2024, equation 3).

    Raises UserError unless scale is finite and >= 0.
    """

    denoiser: Denoiser
    scale: float

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise UserError(f"autoguidance scale is {self.scale}; give a number >= 0 (1 is without)")

    def __call__(self, before: Prediction, step: Step) -> Tensor:
        x0_hat = before(step)
        weak = self.denoiser(step.x, step.sigma, step.cond._replace(keys_values=None))  # those are another network's
        return weak + self.scale * (x0_hat - weak)


@dataclass(frozen=True)
class InstructPix2Pix:
    """Two scales, one for cond.spatial and one for the text (Brooks et al. 2023, equation 3), in one call of 3B rows.

    It takes the place of what comes before it. Raises UserError unless both scales are finite and >= 0.
    """

    image_scale: float = 1.5
    text_scale: float = 7.5

    def __post_init__(self) -> None:
        if not (0 <= self.image_scale < math.inf and 0 <= self.text_scale < math.inf):
            raise UserError(f"{self}: give scales >= 0")

    def __call__(self, before: Prediction, step: Step) -> Tensor:
        image_only = step.null._replace(spatial=step.cond.spatial)
        x0_null, x0_image, x0_both = step.predict(step.null, image_only, step.cond)
        return x0_null + self.image_scale * (x0_image - x0_null) + self.text_scale * (x0_both - x0_image)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): less of the part along D_cond, which saturates.

    It takes the place of what comes before it.

    Args:
        scale: as in classifier-free guidance.
        eta: share of the parallel part that is kept.
        momentum: of the guidance direction over the steps; negative pushes away from the steps before.
        norm: largest norm of a sample's direction; inf for none.
    """

    scale: float
    eta: float = 0.0
    momentum: float = -0.5
    norm: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.scale < math.inf and abs(self.momentum) < 1 and self.norm > 0):
            raise UserError(f"{self}: give scale >= 0, momentum in (-1, 1) and norm > 0")

    def __call__(self, before: Prediction, step: Step) -> Tensor:
        x0_null, x0_cond = step.predict(step.null, step.cond)
        direction = x0_cond - x0_null
        if "apg" in step.memory:
            direction = direction + self.momentum * step.memory["apg"]
        step.memory["apg"] = direction
        direction = direction * (self.norm / _norm(direction)).clamp(max=1)
        unit = x0_cond / _norm(x0_cond)
        parallel = (direction * unit).sum(dim=(1, 2, 3), keepdim=True) * unit
        return x0_cond + (self.scale - 1) * (direction - (1 - self.eta) * parallel)


@dataclass(frozen=True)
class GradientGuidance:
    """x0_hat + scale·σ²·∇ log p: up the gradient, with respect to x, of a score of x0_hat (Dhariwal & Nichol 2021).

    Args:
        log_prob: (x0_hat (B, C, H, W), sigma ()) -> (B,): a classifier's log probability of the wanted class, or the
            similarity to a caption of the decoded picture (CLIP guidance: GLIDE, Nichol et al. 2022). The gradient goes
            through the denoiser, so the score may be one of clean pictures.
        scale: finite and >= 0.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    scale: float

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise UserError(f"gradient guidance scale is {self.scale}; give a number >= 0 (0 is without)")

    @torch.enable_grad()
    def __call__(self, before: Prediction, step: Step) -> Tensor:
        x = step.x.detach().requires_grad_()
        x0_hat = before(step.at(x))
        (gradient,) = torch.autograd.grad(self.log_prob(x0_hat, step.sigma).sum(), x)
        return x0_hat.detach() + self.scale * float(step.sigma) ** 2 * gradient


def _norm(x: Tensor) -> Tensor:
    """(B, 1, 1, 1), never 0."""
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
