"""Thirty typing mistakes and their kin: each refused in one line that names what was meant, before torch is imported."""

import re
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from test_config import composed
from tiny import processor_seconds

from ldm import config, config_check, signatures
from ldm.errors import UserError

D = "experiment=demo "
TYPOS = {  # command line -> what its one line says
    # misspelt
    "experiment=dmo": "there is no experiment/dmo; did you mean demo?",
    D + "trainer.max_stepz=3": "unknown key trainer.max_stepz; did you mean max_steps?",
    D + "model.backbone.chanels=3": "unknown key model.backbone.chanels; did you mean channels?",
    D + "data.batchsize=64": "unknown key data.batchsize; did you mean batch_size?",
    D + "sampling.guidance.scal=3": "unknown key sampling.guidance.scal; did you mean scale?",
    D + "callbacks.emma.decay=0.9": "unknown key callbacks.emma; did you mean ema?",
    D + "sed=1": "unknown key sed; did you mean seed?",
    D + "resume=atuo": "resume=atuo is not one of auto, must, never; did you mean auto?",
    D + "trainer.precision=bf16-mix": "did you mean bf16-mixed?",
    D + "model.backbone._target_=ldm.models.unet.Unet": "there is no Unet; did you mean UNet?",
    D + "model.backbone._target_=ldm.modles.unet.UNet": "there is no modles; did you mean models?",
    D + "model.backbone._target_=models.unet.UNet": "torchmetrics.; did you mean ldm.models.unet.UNet?",
    # in the wrong place
    D + "lr=1e-4": "unknown key lr; did you mean model.optimizer.lr?",
    D + "model.lr=1e-4": "unknown key model.lr; did you mean model.optimizer.lr?",
    D + "optimizer.lr=1e-4": "unknown key optimizer; did you mean model.optimizer?",
    D + "batch_size=64": "unknown key batch_size; did you mean data.batch_size?",
    D + "max_steps=3": "unknown key max_steps; did you mean trainer.max_steps?",
    D + "trainer.steps=3": "unknown key trainer.steps; did you mean max_steps?",
    D + "backbone.channels=96": "unknown key backbone; did you mean model/backbone or model.backbone?",
    # groups
    "experiments=demo": "unknown key experiments; did you mean experiment?",
    D + "modle/backbone=unet_sd1": "unknown key modle/backbone; did you mean model/backbone?",
    D + "model/backbone=unet_sd3": "there is no model/backbone/unet_sd3; did you mean unet_sd",
    D + "model.backbone=unet_sd1": "model.backbone=unet_sd1 is no choice: write model/backbone=unet_sd1",
    D + "sampling/solver=dpmp_2m": "there is no sampling/solver/dpmp_2m; did you mean dpmpp_2m?",
    D + "data/filter=[sise]": "there is no data/filter/sise; did you mean size?",
    D + "trainer=dpp": "there is no trainer/dpp; did you mean ddp?",
    "demo": "'demo' is no override: write key=value, as in experiment=demo",
    # with +, which Hydra takes as it is
    D + "+lr=1e-4": "unknown key lr; did you mean model.optimizer.lr?",
    D + "+model.backbone.chanels=3": "unknown key model.backbone.chanels; did you mean channels?",
    D + "+model.chanels=3": "unknown key model.chanels; did you mean model.backbone.channels?",
    D + "+trainer.max_step=100": "unknown key trainer.max_step; did you mean max_steps?",
    D + "+callbacks.emma.decay=0.9": "unknown key callbacks.emma; did you mean ema?",
    D + "+callbacks.ema.dekay=0.9": "unknown key callbacks.ema.dekay; did you mean decay?",
    D + "+data.decode.filter.x=3": "unknown key data.decode.filter; did you mean filters?",
    D + "+logger.projct=x": "unknown key logger.projct; did you mean project?",
}
VALUES = {
    "experiment=clipart data=latent_arrays data.folder=x": "data=latent_arrays takes no data.decode, which the experiment gives: "
    "leave it out with '~data.decode'",
    "trainer.fast_dev_run=true": "is not listed in the yaml: add it with a plus sign, as in +trainer.fast_dev_run=...",
    "name=x data.side=32": "data.shards is required: give data.shards=...",
    D + "~model.backbone.channels": "model.backbone.channels is required: ldm.models.unet.UNet takes it",
    D + "trainer.max_steps=010": "trainer.max_steps=010 is text; it takes a number",
    D + "trainer.max_steps=12:30": "trainer.max_steps=12:30 is text; it takes a number",
    D + "trainer.max_steps=no": "trainer.max_steps=no is text; it takes a number",
    D + "trainer.max_steps=1e3": "trainer.max_steps=1000.0 is a number; it takes int: write 1000",
    D + "data.decode.random_flip=yes": "data.decode.random_flip=yes is text; it takes bool: write true or false",
    D + "data.side=null": "data.side=null is null; it takes int",
    D + "model.backbone.multipliers=2": "model.backbone.multipliers=2 is a whole number; it takes Sequence[int]",
    D + "model.backbone.multipliers=[1,two]": "model.backbone.multipliers.1=two is text",
    D + "model.backbone.multipliers=[1,0]": "model.backbone.multipliers.1=0 is out of range: it is 1 or more",
    D
    + "data.decode.captions.txt=much": "data.decode.captions={'txt': 'much'} is a mapping; it takes Mapping[str, float",
    D + "seed=0.5": "seed=0.5 is a number; it takes int",
    D + "data.batch_size=0": "data.batch_size=0 is out of range: it is 1 or more",
    D + "trainer.max_steps=-1": "trainer.max_steps=-1 is out of range",
    D + "model.caption_dropout=1.5": "model.caption_dropout=1.5 is out of range: it is a share from 0 to 1",
    D + "model.optimizer.lr=0": "model.optimizer.lr=0 is out of range: it is above 0",
    D + "model.optimizer.lr=1e99": "model.optimizer.lr=1e+99 is out of range",
    D + "model.optimizer.lr=nan": "model.optimizer.lr=nan is out of range",
    D + "model.optimizer.betas=[0.9,1.0]": "model.optimizer.betas.1=1.0 is out of range",
    D + "data.batch_size=63 trainer.accumulate_grad_batches=2": "cannot be split over 1 ranks x 2 accumulation steps",
    D
    + "data.batch_size=64 trainer.devices=3": "data.batch_size=64 cannot be split over 3 ranks x 1 accumulation steps",
    D + "sampling.guidance=7": "sampling.guidance=7 is no choice: write sampling/guidance=...",
    D + "+metrics.mine=3": "unknown key metrics.mine",
    D + "data.side=${data.sid}": "Interpolation key 'data.sid' not found",
    D + "data.side=${data.side}": "Recursive interpolation detected",
    D + "model.backbone._target_=shutil.rmtree": "model.backbone._target_=shutil.rmtree is refused; it must begin with",
    D
    + "logger.api_key=0123": "logger.api_key holds a secret, and a run writes its configuration to files: put it in WANDB_",
    D + "+data.hf_token=0123": "data.hf_token holds a secret",
}


def refusal(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python train.py <line>` says before it would train."""
    GlobalHydra.instance().clear()
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    with pytest.raises(SystemExit) as caught:
        config.entry_point("train", prepare=config.register_networks)(lambda cfg: pytest.fail("it was let through"))()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("line", [*TYPOS, *VALUES])
def test_a_mistake_is_refused_with_what_was_meant(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert ({**TYPOS, **VALUES})[line] in refusal(line, monkeypatch, capsys)


def test_there_are_thirty_typos():
    assert len(TYPOS) >= 30


def test_a_refusal_takes_no_longer_than_composing(tmp_path: Path):
    """By the processor's time: a clock on the wall tells how busy the machine is. torch is not imported."""
    command = [sys.executable, "-X", "importtime", "train.py", "experiment=demo"]
    composing, refusing = [], []
    for _ in range(3):
        seconds, done = processor_seconds([*command, "--cfg", "job"])
        composing.append(seconds)
        assert done.returncode == 0
        seconds, done = processor_seconds([*command, "+model.backbone.chanels=3"])
        refusing.append(seconds)
        assert "did you mean channels?" in done.stderr
        assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
    assert min(refusing) < 2 * min(composing)


@pytest.mark.parametrize(
    "line",
    [
        "model/loss=edm2 model/loss/draw=stratified",
        "sampling/guidance=[cfg,interval,rescale] sampling.guidance.scale=0",
        "trainer=ddp_cpu +trainer.strategy.find_unused_parameters=true",
        "+trainer.fast_dev_run=true +logger.notes=hello +logger.entity=us",
        "data.shards={a:{shards:x.tar,weight:3},b:{shards:y.tar,weight:1}}",
        "callbacks=[latent_diffusion,power_ema] callbacks.progress=null logger=none",
        "model.optimizer._target_=torch.optim.SGD ~model.optimizer.betas ~model.optimizer.fused +model.optimizer.momentum=0.9",
        "data/filter=[size,aesthetic] data.decode.filters.aesthetic.low=6",
        "trainer.devices=auto trainer.val_check_interval=0.5 trainer.gradient_clip_val=null",
        "+model.first_stage.require={psnr:24}",
    ],
)
def test_what_is_right_is_let_through(line: str):
    config.check(composed("train", "experiment=demo", *line.split()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 010\n", "line 1: YAML reads 010 as 8; write 10, or '010' for text"),
        ("a:\n  b: [1, 12:30]\n", "line 2: YAML reads 12:30 as 750; write 750, or '12:30' for text"),
        ("a: 1:30.5\n", "line 1: YAML reads 1:30.5 as 90.5"),
    ],
)
def test_numbers_that_yaml_reads_as_others(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml") as caught:
        config_check.refuse_traps(path)
    assert message in str(caught.value)


def test_numbers_that_yaml_reads_as_they_stand(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: [0, 10, -3, 0.5, 1e-4, 1_000, 0x1f, '010', '12:30']\nb: {0: 1, s3: 's3://a:b/{00..12}'}\n")
    config_check.refuse_traps(path)
    for shipped in config.CONFIGS.rglob("*.yaml"):
        config_check.refuse_traps(shipped)


def test_an_experiment_s_own_mistakes_are_found(monkeypatch: pytest.MonkeyPatch):
    """Hydra takes any key from a file."""
    cfg = composed("train", "experiment=demo")
    for key, value, message in (
        ("modle.x", 1, "unknown key modle; did you mean model"),
        ("model.backbone.chanels", 3, "did you mean channels"),
        ("logger.api_key", "0" * 40, "put it in WANDB_API_KEY"),
        ("name", 10, "name=10 names a directory"),
    ):
        wrong = cfg.copy()
        OmegaConf.set_struct(wrong, False)
        OmegaConf.update(wrong, key, value)
        with pytest.raises(UserError, match=message):
            config.check(wrong)


def test_the_value_of_a_secret_of_the_environment_is_found_wherever_it_stands(monkeypatch: pytest.MonkeyPatch):
    key = "k" * 40
    monkeypatch.setenv("WANDB_API_KEY", key)
    for line in (f"logger.tags=[{key}]", "logger.project=${oc.env:WANDB_API_KEY}"):
        with pytest.raises(UserError, match="holds the value of WANDB_API_KEY") as caught:
            config.check(composed("train", "experiment=demo", line))
        assert key not in str(caught.value)
    with pytest.raises(UserError, match=r"name holds the value of WANDB_API_KEY"):
        config_check.refuse_secrets([f"name={key}"])


def test_a_run_s_own_config_may_not_name_another_target():
    """A run's directory may come from elsewhere."""
    with pytest.raises(UserError, match="is refused; it must begin with"):
        config.build(OmegaConf.create({"_target_": "os.system", "command": "true"}))


def test_every_range_is_of_a_name_that_there_is():
    known: set[str] = set()
    for path in config.CONFIGS.rglob("*.yaml"):
        text = path.read_text()
        known |= set(re.findall(r"(\w+):", text))
        for target in re.findall(r"_target_: ([\w.]+)", text):
            known |= set(getattr(signatures.signature(target), "takes", ()))
    assert {name for *_, names in config_check.RANGES for name in names.split()} - known == set()
