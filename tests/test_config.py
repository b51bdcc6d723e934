"""What happens to a user's mistakes: one line on stderr, exit code 2, no traceback. And the run directory's rules."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from tiny import here, latent_diffusion, process

from ldm import config
from ldm.errors import UserError

DEMO = "experiment=demo"
MISTAKES = {  # command line -> what its one line says
    "": "name is required: give name=... data.shards=",
    "experiment=dmo": "there is no experiment/dmo; did you mean demo?",
    "model=latent_difusion": "there is no model/latent_difusion; did you mean latent_diffusion?",
    f"{DEMO} model/backbone=unet_sd3": "there is no model/backbone/unet_sd3; did you mean unet_sd",
    f"{DEMO} model/backbon=unet_sd1": "unknown key model/backbon; did you mean model/backbone?",
    f"{DEMO} sed=1": "unknown key sed; did you mean seed?",
    f"{DEMO} trainer.max_stepz=4": "unknown key trainer.max_stepz; did you mean max_steps?",
    f"{DEMO} model.optimizer.learning=1": "unknown key model.optimizer.learning; there are: ",
    f"{DEMO} model.backbone.chanels=3": "unknown key model.backbone.chanels; did you mean channels?",
    f"{DEMO} sampling.guidance.scal=3": "unknown key sampling.guidance.scal; did you mean scale?",
    f"{DEMO} +typo=1": "unknown key typo; there are: ",
    f"{DEMO} +sede=1": "unknown key sede; did you mean seed?",
    f"{DEMO} model.backbone._target_=shutil.rmtree": "model.backbone._target_=shutil.rmtree is refused",
    f"{DEMO} name=../../outside": "name=../../outside names a directory under runs/",
    f"{DEMO} name=a;b": "error: ",
    "name=x": "data.shards is required: give data.shards=... ",
}


def is_one_line(code: int, stderr: str, message: str) -> bool:
    assert message in stderr
    assert "Traceback" not in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    return code == 2


@pytest.fixture(scope="module")
def answers() -> dict[str, CompletedProcess[str]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(lambda line: process("train.py", *line.split()), MISTAKES), strict=True))


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_on_the_command_line(line: str, answers: dict[str, CompletedProcess[str]]):
    assert is_one_line(answers[line].returncode, answers[line].stderr, MISTAKES[line])
    assert answers[line].stdout == ""


def test_the_traceback_on_request():
    result = process("train.py", "experiment=dmo", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


AUTOENCODER = ["experiment=demo_autoencoder", "trainer=cpu", "logger=none", "callbacks.progress=null"]


def fails(capsys: pytest.CaptureFixture[str], message: str, *arguments: str, script: str = "train.py") -> None:
    assert is_one_line(here(script, *arguments), capsys.readouterr().err, message)


def test_mistakes_that_only_building_finds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_shards: str, tiny_val: str
):
    run = [f"run_dir={tmp_path}/run"]
    data = [f"data.shards={tiny_shards}", f"data.val_shards={tiny_val}", "data.val_samples=8"]
    missing = "train it first: python train.py experiment=demo_autoencoder"
    fails(capsys, missing, DEMO, *run, f"model.first_stage.run={tmp_path}/none")
    assert not (tmp_path / "run").exists()  # nothing was begun
    fails(capsys, "cannot be split over 1 ranks x 2", *AUTOENCODER, f"run_dir={tmp_path}/batch", *data,
          "data.batch_size=33", "trainer.accumulate_grad_batches=2")  # fmt: skip
    assert here("train.py", *AUTOENCODER, f"run_dir={tmp_path}/gpu", *data, "trainer.accelerator=mps") == 4
    assert capsys.readouterr().err.startswith("error: trainer: ")
    shards = f"data.shards={tmp_path}/nowhere/{{00..12}}.tar"
    fails(capsys, "00.tar' is not a file (13 of 13 are missing); make them with: python -m ldm.data.shapes",
          *AUTOENCODER, f"run_dir={tmp_path}/shards", *data[1:], shards)  # fmt: skip


def test_mistakes_in_evaluation(capsys: pytest.CaptureFixture[str], tmp_path: Path, demo: DictConfig):
    config.open_run(demo)
    fails(capsys, "checkpoint is required", script="evaluate.py")
    fails(capsys, "there is no run in /nowhere", "checkpoint=/nowhere", script="evaluate.py")
    run = f"checkpoint={demo.run_dir}"
    fails(capsys, "has no checkpoint yet", run, script="evaluate.py")
    fails(capsys, "unknown key sampling.guidance.scal; did you mean scale?", run, "sampling.guidance.scal=2",
          script="evaluate.py")  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("data.shards=a/{00..12}.tar", "data.shards='a/{00..12}.tar'"),
        ("data.shards='a/{00..12}.tar'", "data.shards='a/{00..12}.tar'"),
        ("data.shards=[a/{00..12}.tar]", "data.shards=[a/{00..12}.tar]"),
        ("model={a: 1}", "model={a: 1}"),
        ("trainer.max_steps=3", "trainer.max_steps=3"),
        ("--cfg", "--cfg"),
        ("name=", "name="),
    ],
)
def test_brace_ranges_need_no_quotes(argument: str, quoted: str):
    assert config.quote_ranges(argument) == quoted


def test_explain_leaves_other_errors_their_traceback():
    assert config.explain(ZeroDivisionError("division by zero")) is None
    assert config.explain(TypeError("unexpected keyword argument 'x'")) is None  # not ours: no config was being built
    assert config.explain(UserError("say this")) == "say this"
    outer = RuntimeError("around it")
    outer.__cause__ = UserError("the cause")
    assert config.explain(outer) == "the cause"


def composed(name: str, *overrides: str) -> DictConfig:
    if name == "train":
        config.register_networks(list(overrides))
    with initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        cfg = compose(name, [config.quote_ranges(each) for each in overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def test_sources_are_a_mapping_on_the_command_line(tmp_path: Path):
    mixed = 'data.shards={a: {shards: "x/{0000..0003}.tar", weight: 3}, b: {shards: y.tar, weight: 1}}'
    cfg = composed("train", DEMO, f"run_dir={tmp_path}", mixed)
    assert config.plain(cfg.data.shards) == {
        "a": {"shards": "x/{0000..0003}.tar", "weight": 3},
        "b": {"shards": "y.tar", "weight": 1},
    }


@pytest.fixture
def demo(tmp_path: Path) -> DictConfig:
    return composed("train", DEMO, f"run_dir={tmp_path}/runs/demo")


@pytest.mark.parametrize("target", ["builtins.open", "os.system", "ldmx.run", "torch.hub.load"])
def test_only_allowed_targets_are_built(demo: DictConfig, target: str):
    config.check(demo)
    demo.model.loss.weighting._target_ = target
    with pytest.raises(UserError, match=rf"model.loss.weighting._target_={target} is refused"):
        config.check(demo)


@pytest.mark.parametrize("name", ["demo", "a/b-1.5", "lr=1e-4,x+y"])
def test_names_that_are_directories(demo: DictConfig, name: str):
    demo.name = name
    config.check(demo)


@pytest.mark.parametrize("name", ["", ".. ", "../x", "a/../b", "/abs", "a b", "a//b", "a/", "ü;rm"])
def test_names_that_are_not(demo: DictConfig, name: str):
    demo.name = name
    with pytest.raises(UserError, match="names a directory under runs/"):
        config.check(demo)


def test_open_run_writes_the_resolved_config(demo: DictConfig):
    run_dir = config.open_run(demo)
    assert (run_dir / "checkpoints").is_dir()
    saved = config.run_config(run_dir)
    assert saved == OmegaConf.create(config.plain(demo))
    assert "${" not in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("experiment", ["demo", "demo_autoencoder"])
def test_open_run_takes_the_same_run_again_also_longer(tmp_path: Path, experiment: str):
    overrides = [f"experiment={experiment}", f"run_dir={tmp_path}/run"]
    (config.open_run(composed("train", *overrides)) / "checkpoints" / "step_00000001.ckpt").touch()
    config.open_run(composed("train", *overrides))
    longer = ["trainer.max_steps=99999", "logger=none", "callbacks.checkpoint.every=7", "trainer=cpu"]
    run_dir = config.open_run(composed("train", *overrides, *longer))
    assert config.run_config(run_dir).data.steps == 99999


@pytest.mark.parametrize(
    "change", ["model.backbone.channels=128", "seed=1", "data.batch_size=48", "model/loss=simple", "sampling.steps=9"]
)
def test_open_run_refuses_another_run_in_the_same_directory(demo: DictConfig, change: str):
    (config.open_run(demo) / "checkpoints" / "step_00000001.ckpt").touch()
    before = (Path(demo.run_dir) / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"was made with .*, now it is .*: give another name=, or delete"):
        config.open_run(composed("train", DEMO, f"run_dir={demo.run_dir}", change))
    assert (Path(demo.run_dir) / "config.yaml").read_text() == before


def test_a_run_that_has_no_checkpoint_yet_may_still_change(demo: DictConfig):
    """A first attempt with a missing shard, say, is mended in place."""
    config.open_run(demo)
    config.open_run(composed("train", DEMO, f"run_dir={demo.run_dir}", "data.shards=elsewhere.tar"))
    assert config.run_config(demo.run_dir).data.shards == "elsewhere.tar"


def evaluated(demo: DictConfig, *overrides: str) -> DictConfig:
    config.open_run(demo)
    arguments = [f"checkpoint={demo.run_dir}", *overrides]
    config.register_run(arguments)
    cfg = composed("evaluate", *arguments)
    config.check(cfg)
    return cfg


def test_evaluation_takes_over_the_run_s_settings(demo: DictConfig):
    demo.sampling.steps = 7
    cfg = evaluated(demo)
    for group in ("model", "data", "sampling", "metrics"):
        assert cfg[group] == config.run_config(demo.run_dir)[group]
    assert cfg.sampling.steps == 7
    assert cfg.seed == 0


def test_single_values_override_the_run_s(demo: DictConfig):
    cfg = evaluated(demo, "sampling.guidance.scale=2.5", "sampling.steps=3", "n=12")
    assert (cfg.sampling.guidance.scale, cfg.sampling.steps, cfg.n) == (2.5, 3, 12)
    assert cfg.sampling.solver == config.run_config(demo.run_dir).sampling.solver


@pytest.mark.parametrize("schedule", ["rectified_flow", "scaled_linear", "cosine", "karras"])
def test_a_group_replaces_the_run_s_choice_whole(demo: DictConfig, schedule: str):
    cfg = evaluated(demo, "metrics=pixels", f"sampling/schedule={schedule}", "sampling/solver=euler")
    assert cfg.metrics.keys() == {"frechet_pixels"}
    assert cfg.sampling.solver._target_ == "ldm.diffusion.solvers.euler"
    assert cfg.sampling.steps == demo.sampling.steps
    config.build(cfg.sampling)  # nothing of the run's own schedule is left in it


def test_guidance_rules_compose_in_the_order_that_is_given(demo: DictConfig):
    cfg = evaluated(demo, "sampling/guidance=[cfg,interval,rescale]", "sampling.guidance.scale=7",
                    "sampling.guidance.interval.sigma_max=3")  # fmt: skip
    guidance = config.build(cfg.sampling).guidance
    assert guidance.scale == 7
    assert [type(rule).__name__ for rule in guidance.rules.values()] == ["Interval", "Rescale"]
    assert guidance.rules["interval"].sigma_max == 3
    other = composed("train", "experiment=demo", "sampling/guidance=[cfg,rescale,interval]")
    assert [*config.build(other.sampling).guidance.rules] == ["rescale", "interval"]


def test_options_of_every_loss():
    cfg = composed("train", "experiment=demo", "model/loss=edm2", "model/loss/draw=stratified", "model.loss.offset_noise=0.1",
                   "model.loss.schedule.mean=-1", "data.batch_size=16")  # fmt: skip
    config.check(cfg)
    loss = config.build(cfg.model.loss)
    assert sum(p.numel() for p in loss.parameters()) == 128
    assert (loss.inner.offset_noise, loss.inner.draw.batch_size) == (0.1, 16)


def test_the_weaker_denoiser_of_autoguidance_needs_a_frozen_text_encoder(monkeypatch: pytest.MonkeyPatch):
    module = latent_diffusion()
    monkeypatch.setattr(config, "load_run", lambda run: (module, 7))
    with pytest.raises(UserError, match="runs/weak trained its own text encoder"):
        config.denoiser("runs/weak")
    module.conditioner.requires_grad_(False)
    weak = config.denoiser("runs/weak")
    assert weak is module.denoiser
    assert not any(p.requires_grad for p in weak.parameters())


@pytest.mark.parametrize("target", ["${hidden}", "ldm.config.os.system"])
def test_no_way_around_the_targets_that_may_be_built(target: str):
    """A run's directory may come from anybody: neither an interpolation nor a module inside one of ours hides a target."""
    node = OmegaConf.create({"hidden": "os.system", "node": {"_target_": target, "command": "true"}})
    with pytest.raises(UserError, match="is refused"):
        config.build(node.node)
