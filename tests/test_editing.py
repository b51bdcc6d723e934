import math
from functools import partial

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.editing import extend, interpolate, invert, keep, repaint, slerp, start_from
from ldm.diffusion.schedules import Karras, grid
from ldm.diffusion.solvers import dpmpp_2m, euler, heun
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom

RANDOM = KeyedRandom(0, torch.arange(2))
Z = RANDOM.normal("z", (3, 8, 8))
NOISE = RANDOM.normal("noise", (3, 8, 8))
SIGMAS = grid(Karras(0.01, 20.0), 24)
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 4:] = 1


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Data is N(c, 0.5²) with c the mean of x over the picture: pixels depend on each other."""
    s2 = sigma.to(x) ** 2
    center = torch.tanh(x.mean(dim=(1, 2, 3), keepdim=True) / (1 + s2).sqrt())
    return (s2 * center + 0.25 * x) / (0.25 + s2)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 24), (0.5, 12), (0.01, 1)])
def test_img2img_starts_part_of_the_way(strength: float, steps: int):
    x, sigmas = start_from(Z, NOISE, SIGMAS, strength)
    assert len(sigmas) == steps + 1
    assert torch.equal(sigmas, SIGMAS[24 - steps :])
    torch.testing.assert_close(x, Z + sigmas[0] * NOISE)


def test_img2img_keeps_more_of_the_picture_at_lower_strength():
    distances = []
    for strength in (0.1, 0.4, 0.9):
        x, sigmas = start_from(Z, NOISE, SIGMAS, strength)
        distances.append((dpmpp_2m(denoise, x, sigmas) - Z).square().mean().item())
    assert distances == sorted(distances)
    assert distances[0] < 0.1


@pytest.mark.parametrize("solver", [euler, heun, dpmpp_2m])
@pytest.mark.parametrize("begin", [0.0, 1.0], ids=["from noise", "from the picture"])
def test_inpainting_keeps_what_the_mask_keeps(solver, begin: float):
    out = solver(keep(denoise, Z, MASK), begin * Z + SIGMAS[0] * NOISE, SIGMAS)
    torch.testing.assert_close(out[..., :4], Z[..., :4], rtol=0, atol=1e-5)
    assert (out[..., 4:] - Z[..., 4:]).abs().mean() > 0.1


def test_inpainting_sees_the_kept_part_at_its_noise_level():
    """The network is shown z + σ·noise where the picture is kept, at every step."""

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        torch.testing.assert_close(x[..., :4], (Z + sigma * NOISE)[..., :4].float(), rtol=1e-4, atol=1e-4)
        return denoise(x, sigma)

    euler(keep(spy, Z, MASK), Z + SIGMAS[0] * NOISE, SIGMAS)


def test_a_soft_mask_mixes():
    torch.testing.assert_close(
        keep(lambda x, sigma: x, Z, MASK + 0.25 * (1 - MASK))(NOISE, torch.tensor(1.0))[..., :4],
        (0.75 * Z + 0.25 * NOISE)[..., :4],
    )


def test_outpainting_extends_the_canvas():
    canvas, mask = extend(Z, left=2, bottom=4)
    assert canvas.shape == (2, 3, 12, 10)
    assert mask.shape == (2, 1, 12, 10)
    assert torch.equal(canvas[..., :8, 2:], Z)
    assert mask[..., :8, 2:].sum() == 0
    assert mask.sum() == 2 * (120 - 64)
    x = SIGMAS[0] * RANDOM.normal("wide", (3, 12, 10))
    out = euler(keep(denoise, canvas, mask), x, SIGMAS)
    torch.testing.assert_close(out[..., :8, 2:], Z, rtol=0, atol=1e-5)


def test_repaint_keeps_the_picture_and_runs_every_part_as_often_as_asked():
    levels = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma.item())
        return denoise(x, sigma)

    out = repaint(spy, Z, MASK, SIGMAS, lambda purpose: RANDOM.normal(purpose, (3, 8, 8)), euler, jump=10, times=3)
    assert len(levels) == 3 * 24
    assert sorted(set(levels), reverse=True) == [pytest.approx(s) for s in SIGMAS[:-1].tolist()]
    torch.testing.assert_close(out[..., :4], Z[..., :4], rtol=0, atol=1e-5)


def test_repaint_once_is_inpainting():
    noise = lambda purpose: NOISE  # noqa: E731
    out = repaint(denoise, Z, MASK, SIGMAS, noise, euler, jump=100, times=1)
    torch.testing.assert_close(out, euler(keep(denoise, Z, MASK), Z + SIGMAS[0] * NOISE, SIGMAS))


def test_ddim_inversion_comes_back():
    sigmas = grid(Karras(0.01, 20.0), 200)
    errors = {}
    for iterations in (1, 4):
        x = invert(denoise, 0.5 * Z, sigmas, iterations)
        assert (x.std() / 20.0).item() == pytest.approx(1.0, abs=0.1)
        errors[iterations] = (euler(denoise, x, sigmas) - 0.5 * Z).abs().max().item()
    assert errors[1] < 0.1
    assert errors[4] < 0.1 * errors[1]


def test_slerp_keeps_the_norm_and_meets_its_ends():
    other = RANDOM.normal("other", (3, 8, 8))
    assert torch.allclose(slerp(NOISE, other, 0.0), NOISE, atol=1e-6)
    assert torch.allclose(slerp(NOISE, other, 1.0), other, atol=1e-6)
    assert torch.equal(slerp(NOISE, NOISE, 0.3), NOISE)
    middle = slerp(NOISE, other, 0.5)
    assert middle.std().item() == pytest.approx(1.0, abs=0.1)
    assert torch.lerp(NOISE, other, 0.5).std() < 0.8


def conditioning(seed: int, words: int = 4) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(4).expand(2, 4) < words
    return Conditioning(torch.randn(2, 4, 5, generator=generator), mask, torch.randn(2, 3, generator=generator))


def test_prompts_interpolate():
    a, b = conditioning(0, 2), conditioning(1, 3)
    for t, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(interpolate(a, b, t).tokens, end.tokens)
        torch.testing.assert_close(interpolate(a, b, t).vector, end.vector)
    assert interpolate(a, b, 0.5).mask.sum().item() == 6
    one, two = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)
    one[..., 0] = two[..., 1] = 1
    rest = (torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 0))
    middle = interpolate(Conditioning(one, *rest), Conditioning(two, *rest), 0.5).tokens
    torch.testing.assert_close(middle, torch.full((1, 1, 2), math.sqrt(0.5)))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (partial(start_from, Z, NOISE, SIGMAS, 0.0), r"strength is 0.0; .* \(0, 1\]"),
        (partial(start_from, Z, NOISE, SIGMAS, 1.5), "strength is 1.5"),
        (partial(keep, denoise, Z, MASK[..., :4]), r"mask has shape \(1, 1, 8, 4\) .* give \(2 or 1, 1, 8, 8\)"),
        (partial(keep, denoise, Z, MASK.expand(2, 3, 8, 8)), "mask has shape"),
        (partial(keep, denoise, Z, 255 * MASK), r"values outside \[0, 1\]"),
        (partial(extend, Z), "not all 0"),
        (partial(extend, Z, left=-1), "numbers >= 0"),
        (partial(repaint, denoise, Z, MASK, SIGMAS, None, euler, jump=0), "jump=0"),
        (partial(invert, denoise, Z, SIGMAS[:-1]), "fall strictly to 0"),
        (partial(invert, denoise, Z, SIGMAS, 0), "iterations=0"),
        (partial(slerp, Z, NOISE, 1.5), "t is 1.5"),
        (partial(interpolate, conditioning(0), Conditioning(torch.zeros(2, 3, 5), torch.ones(2, 3), torch.zeros(2, 3)), 0.5),
         "give equal shapes"),
    ],
)  # fmt: skip
def test_bad_input(run, message: str):
    with pytest.raises(UserError, match=message):
        run()
