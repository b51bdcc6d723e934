"""Pictures for a prompt, from Python and by `ldm sample`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from test_cli import run  # noqa: F401
from test_config import demo  # noqa: F401
from test_latent_diffusion import SAMPLING
from tiny import SIDE, WordEncoder, first_stage, latent_diffusion

from ldm import config
from ldm.batch import to_uint8
from ldm.diffusion.solvers import heun
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.models.conditioners import TextConditioner
from ldm.training.drawing import Request, draw, save

RED = Request("red circle", SIDE)


def picture(path: Path, side: int = 2 * SIDE, mode: str = "RGB", value: int = 200) -> Path:
    Image.new(mode, (side + 6, side), value if mode == "L" else (value, 10, 90)).save(path)
    return path


def test_picture_i_is_a_function_of_seed_and_i():
    module = latent_diffusion()
    four = draw(module, SAMPLING, RED)
    assert four.shape == (4, 3, SIDE, SIDE)
    assert four.dtype == torch.uint8
    one = draw(module, SAMPLING, Request("red circle", SIDE, count=1, first=2))
    assert (one[0].int() - four[2].int()).abs().max() <= 1
    assert not torch.equal(four[0], four[1])
    assert not torch.equal(draw(module, SAMPLING, Request("red circle", SIDE, seed=1)), four)
    assert not torch.equal(draw(module, SAMPLING, Request("red circle", SIDE, negative="blue")), four)


def test_little_strength_keeps_the_picture_and_a_mask_keeps_what_is_black(tmp_path: Path):
    module, init = latent_diffusion(), picture(tmp_path / "init.png")
    stage = first_stage()
    image = torch.tensor([200, 10, 90], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    z = stage.latents({"image": image}, KeyedRandom(0, torch.tensor([0])))
    kept = (stage.decode(z)[0] * 127.5 + 127.5).round().clamp(0, 255)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    Image.fromarray(mask, "L").save(tmp_path / "mask.png")
    request = Request("red circle", SIDE, count=1, init=init, strength=1.0, mask=tmp_path / "mask.png")
    assert (draw(module, SAMPLING, request)[0].float() - kept).abs().max() <= 1
    whole = draw(module, SAMPLING, Request("red circle", SIDE, count=1, init=init, strength=1.0))[0].float()
    little = draw(module, SAMPLING, Request("red circle", SIDE, count=1, init=init, strength=0.25))[0].float()
    assert (little - kept).abs().mean() < (whole - kept).abs().mean()


def test_solver_scale_and_steps_are_changed_and_the_rest_stays(demo: DictConfig):  # noqa: F811
    own, told = config.sampling(demo)
    assert told == config.plain(demo.sampling)
    other, changed = config.sampling(demo, "heun", 5.0, 7)
    assert (other.guidance.scale, other.steps, other.solver.func) == (5.0, 7, heun)
    assert other.schedule.sigma_max == own.schedule.sigma_max
    assert (changed["solver"]["_target_"], changed["schedule"]) == ("ldm.diffusion.solvers.heun", told["schedule"])
    assert told == config.plain(demo.sampling)
    for change, message in (({"steps": 0}, "0"), ({"solver": "huen"}, "did you mean heun")):
        with pytest.raises(UserError, match=message):
            config.sampling(demo, **change)


def test_pngs_hold_their_parameters(tmp_path: Path):
    paths = save(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8), tmp_path / "out", "seed3", 5, {"prompt": "größe", "mask": None}
    )
    assert [path.name for path in paths] == ["seed3_0005.png", "seed3_0006.png"]
    told = Image.open(paths[1]).text
    assert json.loads(told["ldm"]) == {"prompt": "größe", "mask": None, "index": 6}
    assert told["parameters"] == "prompt: größe\nindex: 6"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"mask": Path("m.png")}, "a mask only with an init"),
        ({"init": Path("none.png")}, "none.png is no picture that can be read"),
    ],
)
def test_bad_requests(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        draw(latent_diffusion(), SAMPLING, Request(**({"prompt": "red", "side": SIDE} | change)))


def test_the_command_refuses_what_is_not_there(run, tmp_path: Path):  # noqa: F811
    code, _, stderr = run("sample", tmp_path / "none", "red")
    assert (code, stderr.startswith("error: there is no run in")) == (2, True)


class Seen(TextConditioner):
    """Remembers the batch."""

    def forward(self, batch, latents=None):
        self.batch = batch
        return super().forward(batch, latents)


def test_models_that_are_trained_to_see_a_mask_or_depth_are_given_them(tmp_path: Path):
    module = latent_diffusion(conditioner=Seen(WordEncoder(), pooled=True))
    mask, depth = tmp_path / "mask.png", tmp_path / "depth.png"
    Image.fromarray(np.repeat([[0, 255]], SIDE, 0).repeat(SIDE // 2, 1).astype(np.uint8)).save(mask)
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 1000).save(depth)
    request = Request("red circle", SIDE, count=2, init=picture(tmp_path / "init.png"), mask=mask, depth=depth)
    draw(module, SAMPLING, request)
    seen = module.conditioner.batch
    assert seen["mask"].shape == (2, 1, SIDE, SIDE)
    assert seen["mask"][0, 0, 0].tolist() == [False] * 4 + [True] * 4
    assert seen["depth"][1, 0].flatten().tolist() == [1000.0 * i for i in range(SIDE * SIDE)]
    draw(module, SAMPLING, replace(request, mask=None))
    assert module.conditioner.batch["mask"].all()  # all of the picture is to be painted
    draw(module, SAMPLING, replace(request, mask=None, init=None))
    assert module.conditioner.batch.keys() == {"caption", "index", "depth"}


@pytest.mark.parametrize("init", [False, True])
def test_each_step_is_shown(init: bool, tmp_path: Path):
    module, shown = latent_diffusion(), []
    request = Request("red circle", SIDE, count=1, init=picture(tmp_path / "i.png") if init else None, strength=1.0)
    out = draw(module, SAMPLING, request, lambda i, x0_hat: shown.append((i, module.first_stage.decode(x0_hat))))
    assert [i for i, _ in shown] == list(range(SAMPLING.steps))
    assert torch.equal(to_uint8(shown[-1][1]), out)
