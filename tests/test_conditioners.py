import math
from typing import Any

import pytest
import torch
from test_text_pretrained import tiny_conditioner
from tiny import SIDE, WordEncoder, batch, captions, first_stage, latent_diffusion, randomized, rows, silent
from torch import Tensor, nn

from ldm.batch import Batch, to_unit
from ldm.conditioning import Conditioning
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.sampling import Sampling
from ldm.diffusion.schedules import Karras, ScaledLinear
from ldm.diffusion.solvers import euler
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.models.conditioners import (
    ClassLabel,
    Combined,
    Conditioner,
    Depth,
    ImageEmbedding,
    Inpainting,
    Learned,
    LowResolution,
    NoiseAugmentation,
    SizeCrop,
    TextConditioner,
    Zeros,
)
from ldm.models.text_pretrained import ConcatText
from ldm.training.ema import trainable


def test_captions_become_tokens_mask_and_vector():
    encoder = WordEncoder()
    cond = TextConditioner(encoder, pooled=True)(Batch(caption=captions(3)))
    tokens, mask, vector = encoder(captions(3))
    assert torch.equal(cond.tokens, tokens)
    assert torch.equal(cond.mask, mask)
    assert torch.equal(cond.vector, vector)
    assert cond.spatial is None


def test_without_pooling_the_vector_has_width_zero():
    cond = TextConditioner(WordEncoder())(Batch(caption=captions(3)))
    assert cond.vector.shape == (3, 0)


def test_the_null_is_the_empty_caption_in_equal_rows_encoded_once():
    encoder = WordEncoder()
    calls = []
    encoder.register_forward_hook(lambda _, args, __: calls.append(args[0]))
    null = TextConditioner(encoder, pooled=True).null(5)
    assert calls == [[""]]
    for part, alone in zip(null[:3], encoder([""]), strict=True):
        assert torch.equal(part, alone.expand(5, *alone.shape[1:]))


def test_a_frozen_encoder_makes_the_null_once_and_training_can_take_it():
    encoder, asked = WordEncoder().requires_grad_(False), []
    encoder.register_forward_hook(lambda *_: asked.append(1))
    conditioner = TextConditioner(encoder, pooled=True, to_null=nn.Identity())
    with torch.inference_mode():  # validation, before a step of training
        conditioner.null(2)
    null, weight = conditioner.null(3), torch.ones((), requires_grad=True)
    (null.tokens * weight).sum().backward()
    assert len(asked) == 1
    with torch.autocast("cpu", torch.bfloat16):
        conditioner.null(2)
    assert len(asked) == 2
    assert not any("empty" in name for name in conditioner.state_dict())


def test_a_trained_encoder_gets_gradients_through_the_null():
    conditioner = TextConditioner(WordEncoder())
    conditioner.null(4).tokens.sum().backward()
    assert conditioner.encoder.table.weight.grad[0].any()


def test_cached_text_is_taken_in_place_of_the_caption():
    encoder = WordEncoder()
    tokens, mask, vector = encoder(captions(3))
    cached = Batch(caption=["never read"] * 3, text_tokens=tokens.half(), text_mask=mask, text_vector=vector.half())
    for pooled in (True, False):
        conditioner = TextConditioner(encoder, pooled)
        live = conditioner(Batch(caption=captions(3)))
        for part, other in zip(conditioner(cached)[:3], live[:3], strict=True):
            torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-3)


def same(a: Conditioning, b: Conditioning) -> bool:
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a, b, strict=True))


def text(to_null: nn.Module | None = None) -> TextConditioner:
    return TextConditioner(randomized(WordEncoder(), 1), pooled=True, to_null=to_null)


def test_nulls_are_the_empty_caption_zeros_or_learned():
    cond = text()(Batch(caption=captions(3)))
    assert same(text().null(3), text()(Batch(caption=[""] * 3)))
    zeros = text(Zeros()).null(3)
    assert [part.shape for part in zeros[:3]] == [part.shape for part in cond[:3]]
    assert not zeros.tokens.any()
    assert not zeros.vector.any()
    assert torch.equal(zeros.mask, text().null(3).mask)
    learned = text(Learned(4, 8, 8))
    null = learned.null(3)
    assert null.mask.all()
    assert torch.equal(null.tokens, learned.to_null.tokens.expand(3, 4, 8))
    (null.tokens.sum() + null.vector.sum()).backward()
    assert learned.to_null.tokens.grad.eq(3).all()


NULLS = {"empty caption": nn.Identity, "zeros": Zeros, "learned": lambda: Learned(4, 8, 8)}


@pytest.mark.parametrize("name", NULLS)
def test_training_sampling_and_a_checkpoint_share_one_null(name: str):
    """What a dropped caption trains with is what guidance leads away from, in the run and out of its checkpoint."""
    module = latent_diffusion(caption_dropout=1.0, conditioner=text(NULLS[name]()))
    null = module.conditioner.null(4)
    trained = seen(module)
    silent(module)
    module.training_step(batch(4), 0)
    assert same(trained[0], null)
    sampled = seen(module.eval())
    module.sample(Sampling(euler, Karras(), Guidance(2.0), steps=1), captions(4), torch.arange(4), SIDE, 0)
    halves = [Conditioning(*(part[half] for part in sampled[0][:3])) for half in (slice(4), slice(4, 8))]
    assert [same(half, null) for half in halves].count(True) == 1

    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other = latent_diffusion(conditioner=text(NULLS[name]()))
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert same(other.conditioner.null(4), null)
    learned = {"conditioner.to_null.tokens", "conditioner.to_null.vector"}
    assert (checkpoint["state_dict"].keys() & trainable(module).keys() >= learned) == (name == "learned")


def seen(module: Any) -> list[Conditioning]:
    """What the backbone is conditioned on, from now on."""
    conds: list[Conditioning] = []
    module.denoiser.backbone.register_forward_hook(lambda _, args, __: conds.append(args[2]))
    return conds


def test_dropping_one_of_several_encoders_leaves_the_rest():
    encoder = ConcatText([[randomized(WordEncoder(), 1), randomized(WordEncoder(), 2)]], [True, False], [1.0, 0.0])
    conditioner = TextConditioner(encoder, pooled=True)
    cond = conditioner(Batch(caption=captions(3)))
    null = conditioner.null(3)
    out = conditioner.drop_parts(cond, null, KeyedRandom(0, torch.arange(3)))
    assert torch.equal(out.tokens, torch.cat([null.tokens[:, :, :8], cond.tokens[:, :, 8:]], dim=2))
    assert torch.equal(out.vector, null.vector)
    assert same(text().drop_parts(cond, null, KeyedRandom(0, torch.arange(3))), cond)


def test_size_and_crop_are_sdxl_s_sinusoids():
    sizes = SizeCrop(64, width=8)
    part = Batch(
        caption=captions(2), original_size=torch.tensor([[480, 640], [64, 64]]), crop=torch.tensor([[0, 7], [3, 0]])
    )
    vector = sizes(part).vector
    assert vector.shape == (2, 48)
    numbers = [480, 640, 0, 7, 64, 64]  # height before width, top before left
    expected = [f(n / 10_000 ** (k / 4)) for n in numbers for f in (math.cos, math.sin) for k in range(4)]
    torch.testing.assert_close(vector[0], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    plain = sizes(Batch(caption=["", ""]))
    whole = torch.tensor([[64, 64]] * 2)
    assert same(
        plain, sizes(Batch(caption=["", ""], original_size=whole, crop=torch.zeros_like(whole), target_size=whole))
    )
    assert same(sizes.null(2), plain)
    assert same(sizes.null(2, sizes(part)), sizes(part))
    larger = sizes(Batch(caption=[""], target_size=torch.tensor([[96, 32]])))
    assert (larger.vector - plain.vector[:1]).abs().max() > 0.1


def test_class_labels():
    classes = ClassLabel(5, 8)
    with pytest.raises(UserError, match="a sample to train on has neither label nor caption: give data/field=label"):
        classes(Batch(caption=["4", ""]))
    classes.eval()
    cond = classes(Batch(label=torch.tensor([4, 0, 4])))
    assert torch.equal(cond.vector, classes.table.weight[[4, 0, 4]])
    assert cond.tokens.shape == (3, 0, 0)
    assert torch.equal(classes.null(3).vector, classes.to_null.vector.expand(3, 8))
    assert same(classes.null(3, cond), classes.null(3))
    named = classes(Batch(caption=["4", "", "0"])).vector
    assert torch.equal(
        named, torch.stack([classes.table.weight[4], classes.to_null.vector[0], classes.table.weight[0]])
    )
    for caption in ("a cat", "5", "-1"):
        with pytest.raises(UserError, match=rf"prompt is '{caption}', but this model knows classes: give 0 to 4"):
            classes(Batch(caption=[caption]))


def noise(**changes: int) -> NoiseAugmentation:
    return NoiseAugmentation(ScaledLinear(), **({"below": 1000, "level": 0, "seed": 7} | changes))


def test_noise_augmentation_is_the_forward_process_and_belongs_to_the_sample():
    x, part = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)), Batch(index=torch.arange(6))
    noised, level = noise()(x, part, training=True)
    assert level.unique().numel() > 3
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[level.long()].float().view(-1, 1, 1, 1)
    expected = kept.sqrt() * x + (1 - kept).sqrt() * KeyedRandom(7, part["index"]).normal("augmentation", (3, 4, 4))
    torch.testing.assert_close(noised, expected, rtol=1e-4, atol=1e-4)
    alone, own = noise()(x[3:4], Batch(index=torch.tensor([3])), training=True)
    assert (alone[0], own[0].item()) == (pytest.approx(noised[3]), level[3].item())
    assert (noise(below=50)(x, part, True)[1] < 50).all()
    assert noise(level=20)(x, part, training=False)[1].tolist() == [20.0] * 6
    asked = Batch(index=torch.arange(6), noise_level=torch.arange(6))
    assert noise()(x, asked, training=True)[1].tolist() == list(range(6))
    with pytest.raises(UserError, match="level=1000, below=10: noise levels are 0 to 999"):
        noise(below=10, level=1000)


class Mean(nn.Module):
    """An embedding of a picture: the mean of each channel, and one weight more."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image.mean(dim=(2, 3)), image.amax(dim=(1, 2, 3))[:, None]], dim=1)


def test_an_image_embedding_is_noised_and_its_null_is_zero():
    conditioner = ImageEmbedding(Mean(), 4, noise(), dropout=0.5).eval()
    part = batch(64)
    cond = conditioner(part)
    torch.testing.assert_close(cond.vector[:, :4], Mean()(to_unit(part["image"])), rtol=0.1, atol=0.1)  # level 0
    assert torch.equal(cond.vector[0, 4:], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    null = conditioner.null(64, cond)
    assert not null.vector.any()
    random = KeyedRandom(0, part["index"])
    out = conditioner.drop_parts(cond, null, random)
    kept = random.uniform("embedding_dropout") >= 0.5
    assert 16 < kept.sum() < 48
    assert same(out, cond.where(kept, null))
    with pytest.raises(UserError, match="ImageEmbedding needs a picture"):
        conditioner(Batch(caption=["a"]))


def test_a_low_resolution_picture_is_noised():
    conditioner, part = LowResolution(2, noise(level=20)).eval(), batch(3)
    cond = conditioner(part)
    assert cond.spatial.shape == (3, 3, SIDE // 2, SIDE // 2)
    assert cond.vector.tolist() == [[20.0]] * 3
    given = Batch(low_resolution=torch.full((3, 3, 4, 4), 255, dtype=torch.uint8), index=part["index"])
    quiet = conditioner(given | {"noise_level": torch.zeros(3, dtype=torch.long)})
    torch.testing.assert_close(quiet.spatial, torch.ones(3, 3, 4, 4), rtol=0, atol=0.15)
    assert same(conditioner.null(3, cond), cond)  # guidance is of the text
    with pytest.raises(AssertionError, match=r"call null\(n, cond\)"):
        conditioner.null(3)


def test_inpainting_shows_the_mask_and_what_it_leaves():
    conditioner, stage, part = Inpainting(2, seed=0), first_stage(), batch(3)
    mask = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
    mask[:, :, :, : SIDE // 2] = True
    given = part | {"mask": mask}
    cond = conditioner(given, stage.latents)
    assert cond.spatial.shape == (3, 1 + 2, SIDE // 2, SIDE // 2)
    assert torch.equal(cond.spatial[:, 0, :, :2], torch.ones(3, 4, 2))
    assert not cond.spatial[:, 0, :, 2:].any()
    hidden = torch.where(mask, torch.randint(0, 256, mask.shape, dtype=torch.uint8), part["image"])
    assert same(conditioner(given | {"image": hidden}, stage.latents), cond)
    shown = torch.where(mask, part["image"], 255 - part["image"])
    assert not same(conditioner(given | {"image": shown}, stage.latents), cond)
    gray = torch.where(mask, 0.0, to_unit(part["image"]))
    torch.testing.assert_close(cond.spatial[:, 1:], stage.latents({"image": (gray + 1) * 127.5},
        KeyedRandom(2**32, part["index"])), rtol=1e-4, atol=1e-4)  # fmt: skip
    with pytest.raises(AssertionError, match="needs the first stage"):
        conditioner(part)


def test_training_masks_are_boxes_of_the_sample_or_everything():
    conditioner, part = Inpainting(3, seed=0), batch(200)
    latents = lambda part, random: part["image"]  # noqa: E731  at full size
    mask = conditioner(part, latents).spatial[:, 0]
    whole = (mask == 1).all(dim=(1, 2)).float().mean().item()
    assert 0.15 < whole < 0.4
    assert 0.1 < mask.mean(dim=(1, 2))[~(mask == 1).all(dim=(1, 2))].mean() < 0.6
    few = conditioner(rows(part, [7, 3]), latents).spatial[:, 0]
    assert torch.equal(few, mask[[7, 3]])


def test_depth_is_scaled_sample_by_sample():
    part, ramp = batch(2), torch.arange(64.0).view(1, 1, 8, 8)
    depth = torch.cat([ramp, 5 * ramp + 3])
    given = Depth(2)(part | {"depth": depth}).spatial
    assert given.shape == (2, 1, 4, 4)
    assert given.amin(dim=(1, 2, 3)).tolist() == [-1.0, -1.0]
    assert given.amax(dim=(1, 2, 3)).tolist() == [1.0, 1.0]
    torch.testing.assert_close(given[0], given[1], rtol=1e-4, atol=1e-4)
    estimated = Depth(2, nn.AvgPool2d(2))(part | {"image": part["image"]})
    assert estimated.spatial.shape == (2, 3, 4, 4)
    with pytest.raises(UserError, match="or an estimator"):
        Depth(2)(part)
    assert torch.equal(Depth(2)(Batch(depth=depth)).spatial, given)  # sampling from a depth map alone


def combined() -> Combined:
    return Combined(text(Zeros()), [SizeCrop(64, 4), LowResolution(2, noise(level=20)), Inpainting(2, seed=0)])


def test_combined_parts_keep_their_own_nulls():
    conditioner, part, stage = combined().eval(), batch(3), first_stage()
    part["original_size"] = torch.tensor([[100, 90]] * 3)
    cond = conditioner(part, stage.latents)
    assert cond.vector.shape == (3, 8 + 24 + 1)
    assert cond.spatial.shape == (3, 3 + 1 + 2, 4, 4)
    each = [own(part, stage.latents) for own in conditioner.parts]
    assert same(Conditioning(*each[0][:3]), Conditioning(*cond[:2], cond.vector[:, :8]))
    null = conditioner.null(3, cond)
    assert not null.tokens.any()
    assert not null.vector[:, :8].any()
    assert torch.equal(null.vector[:, 8:], cond.vector[:, 8:])
    assert torch.equal(null.spatial, cond.spatial)
    assert conditioner.encoder is conditioner.parts[0].encoder
    assert same(conditioner.drop_parts(cond, null, KeyedRandom(0, part["index"])), cond)
    assert same(
        Combined(text(), [SizeCrop(64, 4)]).null(2), Combined(text(), [SizeCrop(64, 4)])(Batch(caption=["", ""]))
    )
    assert Combined(ClassLabel(3, 8), [SizeCrop(64, 4)]).encoder is None


@pytest.mark.parametrize(
    ("name", "channels", "vector"), [("sd2_inpaint", 5, 0), ("sd2_depth", 1, 0), ("x4_upscaler", 3, 1)]
)
def test_the_spatial_configs(name: str, channels: int, vector: int):
    conditioner: Conditioner = tiny_conditioner(name).eval()
    part = batch(2, side=32) | {"depth": torch.rand(2, 1, 32, 32)}
    latents = lambda part, random: torch.zeros(2, 4, 4, 4)  # noqa: E731
    cond = conditioner(part, latents)
    assert cond.tokens.shape == (2, 77, 16)
    assert (cond.spatial.shape[1], cond.vector.shape[1]) == (channels, vector)
    assert torch.equal(conditioner.null(2, cond).spatial, cond.spatial)
