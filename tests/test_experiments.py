"""Every experiment that ships: its header's command, shrunk, for two real steps; and its parameters at full size."""

import io
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from conftest import picture, write_tar
from hydra.errors import InstantiationException
from shrunk import STEPS, shrink, train
from test_config import composed
from test_configs import EXPERIMENTS, commands
from tiny import here

from ldm import config
from ldm.conditioning import Conditioning
from ldm.training import checkpointing

pytestmark = [
    pytest.mark.filterwarnings("error:.*get no gradient"),
    pytest.mark.filterwarnings("error:.*trained without caption dropout"),
]
STANDS_FOR = {"sd2_base": "sd2_256"}  # an imported run: one trained here
FROM_A_RUN = ("finetune_sd",)
# experiment -> parameters of the backbone, channels of latents and of cond.spatial, side of the latents, shape of the
# tokens, width of the vector
FULL = {
    "ldm_text2img": (872_300_484, 4, 0, 32, (77, 1280), 0),
    "sd1_256": (859_520_964, 4, 0, 32, (77, 768), 0),
    "sd1_512": (859_520_964, 4, 0, 64, (77, 768), 0),
    "sd2_256": (865_910_724, 4, 0, 32, (77, 1024), 0),
    "sd2_512_v": (865_910_724, 4, 0, 64, (77, 1024), 0),
    "sd2_inpaint": (865_925_124, 4, 5, 64, (77, 1024), 0),
    "sd2_depth": (865_913_604, 4, 1, 64, (77, 1024), 0),
    "x4_upscaler": (473_398_020, 4, 3, 128, (77, 1024), 1),
    "sdxl_256": (2_567_463_684, 4, 0, 32, (77, 2048), 2816),
    "sdxl_512": (2_567_463_684, 4, 0, 64, (77, 2048), 2816),
    "sdxl_1024": (2_567_463_684, 4, 0, 128, (77, 2048), 2816),
    "sd3_medium": (2_028_328_000, 16, 0, 32, (333, 4096), 2048),
    "dit_xl_256": (676_319_632, 4, 0, 32, (0, 0), 1152),
    "flow_dit_256": (824_641_936, 4, 0, 32, (77, 768), 0),
    "pixel_64": (372_153_795, 3, 0, 64, (0, 0), 768),
}


def depth(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(number).random((6, 9), np.float32))
    return file.getvalue()


def members(number: int) -> dict[str, bytes]:
    """All that any experiment asks of a sample, LAION's scores among it."""
    scores = {"aesthetic": 6, "pwatermark": 0.1, "punsafe": 0.01, "original_width": 4000, "original_height": 3000}
    return {"jpg": picture(number), "txt": b"picture %d" % number, "json": json.dumps(scores).encode(),
            "cls": b"%d" % (number % 7), "depth.npy": depth(number)}  # fmt: skip


class Runs:
    """Shrunk runs by name, each trained once, and those that it needs before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for shard in range(2):
            rows = [
                (f"{n:09d}.{name}", data) for n in range(8 * shard, 8 * shard + 8) for name, data in members(n).items()
            ]
            write_tar(folder / f"{shard:05d}.tar", rows)

    def train(self, arguments: list[str]) -> Path:
        """arguments: of `python train.py`, but for the data."""
        data = [f"data.shards={self.folder}/00000.tar", f"data.val_shards={self.folder}/00001.tar"]
        cfg = composed("train", *arguments, *data, "logger=none", "callbacks.progress=null")
        run = self.folder / cfg.name
        if run.exists():
            return run
        cfg.run_dir = str(run)
        if cfg.init_from:
            name = Path(cfg.init_from).name
            cfg.init_from = str(self.train([f"experiment={STANDS_FOR.get(name, name)}"]))
        stage = cfg.model.get("first_stage", {})
        if "run" in stage:
            by_training = shlex.split(stage.command.partition("train.py ")[2])  # nothing: by `ldm import`
            made = self.train(by_training or ["experiment=kl_f8"])
            assert not by_training or made.name == Path(stage.run).name
            stage.run = str(made)
        shrink(cfg)
        train(cfg)
        return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    "path", [path for path in EXPERIMENTS if path.stem not in FROM_A_RUN], ids=lambda path: path.stem
)
def test_every_experiment_s_own_command_trains_shrunk(path: Path, runs: Runs):
    """The first stage by the command that the experiment itself names, and the run that it starts from, come before it."""
    run = runs.train(commands(path)[0])
    assert checkpointing.step_of(checkpointing.newest(run)) == STEPS
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [value for row in rows for name, value in row.items() if name.startswith(("train/", "val/"))]
    assert all(value is not None and math.isfinite(value) for value in values)
    assert {name for row in rows for name in row} >= {"val/loss"} or any("val/psnr" in row for row in rows)
    assert list((run / "samples").glob("*.png"))
    torch.manual_seed(0)  # random text encoders are drawn again
    module, step = config.load_run(run)
    assert step == STEPS
    assert type(module).__name__ == composed("train", *commands(path)[0]).model._target_.rpartition(".")[2]


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_are_the_published_ones_and_fit_together(name: str):
    """On the meta device: the backbone has so many parameters, and takes what first stage and conditioner give."""
    parameters, channels, spatial, side, tokens, vector = FULL[name]
    path = config.CONFIGS / "experiment" / f"{name}.yaml"
    cfg = composed("train", *commands(path)[0])
    with torch.device("meta"), torch.no_grad():
        backbone = config.build(cfg.model.backbone)
        seen = Conditioning(torch.zeros(1, *tokens), torch.ones(1, tokens[0], dtype=torch.bool), torch.zeros(1, vector))
        x = torch.zeros(1, channels + spatial, side, side)
        assert backbone(x, torch.zeros(1), seen).shape == (1, channels, side, side)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert vector == getattr(backbone, "vector_width", None) or vector == getattr(backbone, "vector_channels", None)


def test_ldm_text2img_has_its_1_45_billion_parameters_with_its_text_encoder():
    cfg = composed("train", "experiment=ldm_text2img", "data.shards=x")
    with torch.device("meta"):
        parts = config.build(cfg.model.backbone), config.build(cfg.model.conditioner)
    total = sum(p.numel() for part in parts for p in part.parameters())
    assert total == 872_300_484 + 587_989_760
    assert abs(total / 1.45e9 - 1) < 0.01


@pytest.mark.parametrize("name", ["sd1_256", "sd2_512_v", "x4_upscaler", "dit_xl_256"])
def test_the_backbone_sees_the_index_of_the_schedule_that_it_trains_on(name: str):
    cfg = composed("train", f"experiment={name}", "data.shards=x")
    schedule, ends = config.build(cfg.model.loss).schedule, torch.tensor([0.0, 1.0])
    labels = config.build(cfg.model.parameterization).coefficients(schedule(ends)).c_noise
    torch.testing.assert_close(labels, torch.tensor([0.0, 999.0], dtype=torch.float64))
    assert config.build(cfg.sampling).schedule == schedule


def test_sd3_s_shift_for_larger_pictures_is_one_number_for_training_and_sampling():
    overrides = ["experiment=sd3_medium", "data.shards=x"]
    plain, shifted = (composed("train", *overrides, *more) for more in ([], ["model.loss.schedule.shift=3"]))
    t = torch.linspace(0.1, 0.9, 5)
    for draws in (
        lambda cfg: config.build(cfg.model.loss).schedule(t),
        lambda cfg: config.build(cfg.sampling).schedule(t),
    ):
        torch.testing.assert_close(draws(shifted), 3 * draws(plain))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ldm import` makes of a small pipeline with random weights, saved by diffusers."""
    return pipelines.imported("sd1", tmp_path_factory.mktemp("imported"))


def finetune(run: Path, out: Path, shards: str, *changes: str) -> int:
    return here(
        "train.py", "experiment=finetune_sd", f"init_from={run}", f"data.shards={shards}", f"run_dir={out}",
        "trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "data.side=16",
        "data.val_samples=4", "sampling.steps=2", "callbacks.pictures.count=2", "callbacks.progress=null", "logger=none",
        *changes,
    )  # fmt: skip


def test_finetune_sd_goes_on_from_an_imported_model(imported: Path, tiny_shards: str, tmp_path: Path):
    """Its networks, sampling and weights, its own optimizer; at next to no learning rate they stay what they are."""
    assert finetune(imported, tmp_path / "still", tiny_shards, "model.optimizer.lr=1e-12") == 0
    assert finetune(imported, tmp_path / "run", tiny_shards, "model.optimizer.lr=1e-2") == 0
    before = config.averaged_weights(imported)
    still, after = (config.averaged_weights(tmp_path / name) for name in ("still", "run"))
    assert before.keys() == still.keys() == after.keys()
    assert [key for key in before if (before[key] - still[key]).abs().max() > 1e-7] == []
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    was, now = config.run_config(imported), config.run_config(tmp_path / "run")
    for part in ("backbone", "parameterization", "conditioner", "first_stage", "loss"):
        assert now.model[part] == was.model[part]
    assert (now.model.optimizer.lr, now.model.lr_schedule.warmup, now.sampling.steps) == (0.01, 0, 2)
    assert {**now.sampling, "steps": 50} == was.sampling
    rows = [json.loads(line) for line in (tmp_path / "still" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] < 10  # a network with other weights, or another scale of latents, is far above


def test_what_a_finetuned_model_is_made_of_can_be_changed(imported: Path):
    cfg = composed(
        "train", "experiment=finetune_sd", f"init_from={imported}", "data.shards=x", "model.caption_dropout=0.2"
    )
    config.check(cfg)
    assert cfg.model.caption_dropout == 0.2
    assert cfg.data.side == config.run_config(imported).data.side
    assert cfg.model.seed == cfg.seed == 0
    assert (
        composed("train", "experiment=finetune_sd", f"init_from={imported}", "data.shards=x", "seed=3").model.seed == 3
    )


def test_finetuning_needs_a_run_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = composed("train", "experiment=finetune_sd", "data.shards=x")
    config.check(cfg)
    with pytest.raises(InstantiationException, match=r"init_from is required: .* give init_from="):
        config.build(cfg.model)
    assert finetune(tmp_path / "none", tmp_path / "run", "x") == 2
    assert "ldm import SOURCE" in capsys.readouterr().err
