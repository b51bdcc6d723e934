"""Every yaml file: reached by its group, composed, checked, and built."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import CACHE, encode, write_source
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from test_config import composed
from test_text_pretrained import TINY, nodes
from tiny import ROOT, process

from ldm import config
from ldm.data.arrays import pack
from ldm.data.latents import Stamp
from ldm.errors import UserError

OPTIONS = sorted(path.relative_to(config.CONFIGS) for path in config.CONFIGS.glob("*/**/*.yaml"))
EXPERIMENTS = sorted((config.CONFIGS / "experiment").glob("*.yaml"))
DATA = ["data.shards=s/{0..3}.tar", "data.val_shards=v.tar", "data.side=32", "data.batch_size=4"]
NAMED = ["name=x", "trainer.max_steps=3", *DATA]


CACHED = {  # options that read a latent cache, and what they require
    "latents": "data.decode.folder",
    "latent_arrays": "data.folder",
    "cached_text": "model.conditioner.encoder.folder",
}
# whose weights have to be fetched: test_text_pretrained and test_conditioners build them with tiny networks
FETCHED = {
    "clip_l",
    "openclip_h",
    "sdxl",
    "sd3",
    "t5_xxl",
    "sd2_inpaint",
    "sd2_depth",
    "x4_upscaler",
    "inception",
    "dinov2",
}
OF_AUTOENCODERS = ("model/autoencoder", "model/adversary", "model/loss/perceptual")
FILTER_NEEDS = {"caption_words": "words", "duplicates": "path"}


def built(node: DictConfig, **objects: Any) -> Any:
    with torch.device("meta"):
        return config.build(node, **objects)


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in OPTIONS
        if path.stem not in {*CACHED, *FETCHED} and path.parts[0] not in ("experiment", "protocol")
    ],
    ids=str,
)
def test_every_option_is_composed_and_built(path: Path, tmp_path: Path):
    group, option = path.parent.as_posix(), path.stem
    model = "autoencoder" if group in OF_AUTOENCODERS else "latent_diffusion"
    choice = [f"{group}={option}"] if group != "model" else []
    choice += ["model/conditioner=class_label"] if option == "label" else []
    cfg = composed("train", f"model={option if group == 'model' else model}", *choice, *NAMED, f"run_dir={tmp_path}")
    if option == "autoguidance":
        with pytest.raises(UserError, match=r"sampling.guidance.autoguidance.denoiser.run is required"):
            config.check(cfg)
        return
    if option in FILTER_NEEDS:
        with pytest.raises(UserError, match=rf"data.decode.filters.{option}.{FILTER_NEEDS[option]} is required"):
            config.check(cfg)
        return
    if option == "fine_tuned":
        with pytest.raises(UserError, match=r"model.autoencoder.run is required"):
            config.check(cfg)
        return
    config.check(cfg)
    node = cfg
    for part in path.parent.parts if group not in ("data/filter", "data/field") else ("data", "decode"):
        node = node[part]
    if str(path) == "model/first_stage/run.yaml" or (group, option) == ("model", "latent_diffusion"):
        node = cfg.model.first_stage
        node.run = "runs/none"
        with pytest.raises(InstantiationException, match=r"train it first: python train\.py experiment=demo_auto"):
            config.build(node)
    elif option == "lpips":
        with pytest.raises(InstantiationException, match=r"fetch .* `ldm fetch vgg16 weights/vgg16.pth`"):
            config.build(node)
    elif group == "trainer":
        node.accelerator = "cpu"  # the machine may have no other
        node.devices = 1
        assert config.build(node, logger=False).max_steps == 3
    elif group == "logger":
        assert (option == "none" and not node) or config.build(node).name == "ldm"
    elif group in ("callbacks", "metrics"):
        assert len(config.build_each(node)) == len(node)
    else:
        assert built(node) is not None


def test_options_that_read_a_latent_cache(tmp_path: Path):
    (tmp_path / "source").mkdir()
    spec, cache, arrays = write_source(tmp_path / "source", 1), tmp_path / "cache", tmp_path / "arrays"
    encode(spec, cache)
    pack(cache, arrays, CACHE)
    plain = ["model=latent_diffusion", "name=x", "trainer.max_steps=3", "data.side=8", "data.batch_size=4"]
    text = ["model/conditioner=cached_text", f"model.conditioner.encoder.folder={cache}"]
    tars = composed("train", "data=latents", *plain, *text, "data.shards=a.tar", f"data.decode.folder={cache}")
    columns = composed("train", "data=latent_arrays", *plain, f"data.folder={arrays}", "data.val_samples=3")
    config.check(tars)
    config.check(columns)
    assert config.build(tars.data).stamp == config.build(columns.data).stamp == Stamp.read(cache)
    assert config.build(tars.model.conditioner).null(2).tokens.shape == (2, 4, 8)
    packed = composed("train", "experiment=clipart", "data=latent_arrays", f"data.folder={arrays}", "~data.decode")
    assert config.plain(packed)["model"]["first_stage"]["command"].endswith("clipart_autoencoder data.shards='...'")
    for option, key in CACHED.items():
        group = "model/conditioner" if option == "cached_text" else "data"
        with pytest.raises(UserError, match=f"{key}.* is required|give.* {key}="):
            config.check(composed("train", f"{group}={option}", *plain))


@pytest.mark.parametrize("name", ["latent_diffusion", "autoencoder"])
def test_callbacks_stand_in_an_order_that_works(name: str):
    """The data position and the average are up to date when the checkpoint is written."""
    names = list(composed("train", f"callbacks={name}", *NAMED).callbacks)
    assert names.index("position") < names.index("checkpoint")
    assert names.index("ema") < names.index("checkpoint")
    assert names.index("ema") < names.index("pictures")


def header(path: Path) -> list[str]:
    return [
        line[1:].strip() for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line
    ]


def commands(path: Path) -> list[list[str]]:
    """The arguments of the train.py commands in a file's header."""
    text = "\n".join(header(path)).replace("\\\n", "")
    return [shlex.split(found) for found in re.findall(r"python train.py (.*?)(?:\.?$|  )", text, re.MULTILINE)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_a_short_diff_that_says_command_cost_and_expectation(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) < 30
    assert lines[0] == "# @package _global_"
    text = " ".join(header(path))
    assert "Cost: " in text
    assert "Expect: " in text
    assert any(f"experiment={path.stem}" in command for command in commands(path))


# finetune_sd composes over an imported run: see test_experiments
@pytest.mark.parametrize(
    "path", [path for path in EXPERIMENTS if path.stem != "finetune_sd"], ids=lambda path: path.stem
)
def test_every_experiment_s_own_command_composes_and_builds(path: Path):
    cfg = composed("train", *commands(path)[0])
    config.check(cfg)
    assert cfg.name == path.stem
    OmegaConf.set_struct(cfg, False)
    for node in nodes(cfg.model.get("conditioner")):  # whose weights have to be fetched
        node.config, node.weights = TINY[node.weights], None
    if "first_stage" in cfg.model:
        cfg.model.first_stage = composed("train", "model/first_stage=pixels", *NAMED).model.first_stage
    if cfg.model.get("loss", {}).get("perceptual"):  # whose weights have to be fetched
        cfg.model.loss.perceptual = None
    module = built(cfg.model)
    assert any(p.requires_grad for p in module.parameters())
    data = config.build(cfg.data)
    assert data.batch_size % cfg.trainer.accumulate_grad_batches == 0
    assert data.steps == cfg.trainer.max_steps
    assert len(config.build_each(cfg.callbacks)) == len(cfg.callbacks)
    assert config.build(cfg.sampling).steps > 0


@pytest.mark.parametrize(
    "path", [path for path in EXPERIMENTS if path.stem != "finetune_sd"], ids=lambda path: path.stem
)
def test_every_key_of_an_experiment_is_one_of_its_group_s(path: Path):
    """An experiment cannot add a key that its groups do not have: Hydra's struct mode would not see it."""
    cfg = composed("train", f"experiment={path.stem}", *DATA)
    text = path.read_text()
    while based := re.search(r"^  - ([a-z]\w+)$", text, re.MULTILINE):  # on another experiment
        text = (path.parent / f"{based[1]}.yaml").read_text() + text.replace(based[0], "")
    choices = [line.split(":") for line in re.findall(r"override (/\S+: \S+)", text)]
    chosen = {group[1:]: option.strip() for group, option in choices}
    plain = composed("train", *[f"{group}={option}" for group, option in chosen.items()], *NAMED)
    added = {key for key, _ in config.leaves(cfg)} - {key for key, _ in config.leaves(plain)}
    assert {key for key in added if not key.rpartition(".")[2].isdigit()} == set()


def test_the_command_line_shows_the_config():
    result = process("train.py", "experiment=demo", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "caption_dropout: 0.1" in result.stdout
    assert result.stderr == ""


def test_the_package_holds_no_yaml_elsewhere():
    assert list((ROOT / "ldm").rglob("*.yaml")) == []
