"""What is read from files of others, and every way in which such a file can be bad: one clear line that names the key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpointing import Gadget
from torch import Tensor

from ldm.diffusion.schedules import Linear
from ldm.errors import UserError
from ldm.interop import exporting, sources

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.saved("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    path = folder.parent / "model.safetensors"
    exporting.write_single_file(sources.read(folder), path, torch.float32)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def changed(path: Path, change: Callable[[State], Any], out: Path) -> Path:
    """The tensors of a file after a change, without what it said of itself."""
    state = load_file(path)
    change(state)
    save_file(state, out)
    return out


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same(a: sources.Model, b: sources.Model) -> None:
    for ours, theirs in ((a.unet, b.unet), (a.autoencoder, b.autoencoder), (a.text[0].state, b.text[0].state)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert a.unet_arguments == b.unet_arguments
    assert a.autoencoder_arguments == b.autoencoder_arguments
    assert (a.mean, a.std, a.prediction, a.schedule) == (b.mean, b.std, b.prediction, b.schedule)


def test_a_single_file_and_a_folder_are_the_same_model(folder: Path, single: Path, tmp_path: Path):
    model = sources.read(folder)
    assert (model.prediction, model.side, model.notes) == ("eps", 16, [])
    assert_same(model, sources.read(single))
    torch.save({"state_dict": load_file(single), "global_step": 470_000, "epoch": 0}, tmp_path / "model.ckpt")
    assert_same(model, sources.read(tmp_path / "model.ckpt"))


def test_what_training_leaves_beside_the_weights_is_known(folder: Path, single: Path, tmp_path: Path):
    """Tables of the schedule, and LitEma's average: names without dots."""

    def add(state: State) -> None:
        names = {key: f"model_ema.{key.removeprefix('model.').replace('.', '')}" for key in state
                 if key.startswith("model.diffusion_model.")}  # fmt: skip
        state |= {name: state[key] + 1 for key, name in names.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5), "betas": torch.ones(3),
                  "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}  # fmt: skip

    model = sources.read(changed(single, add, tmp_path / "full.safetensors"))
    assert_same(model, sources.read(folder))
    assert all(torch.equal(value, model.unet[key] + 1) for key, value in model.average.items())


def test_wrappers_prefixes_are_stripped_and_told(folder: Path, single: Path, tmp_path: Path):
    def wrap(state: State) -> None:
        for key in list(state):
            state[f"module.{key.replace('diffusion_model.', 'diffusion_model._orig_mod.')}"] = state.pop(key)

    model = sources.read(changed(single, wrap, tmp_path / "wrapped.safetensors"))
    assert_same(model, sources.read(folder))
    assert model.notes == [f"wrapped.safetensors: stripped module. or _orig_mod. from {len(load_file(single))} keys"]


def test_half_precision_shards_and_variants(copy: Path):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    state = {key: value.half() for key, value in load_file(path).items()}
    path.unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for name, part in parts.items():
        save_file({key: state[key] for key in part}, path.with_name(name))
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = sources.read(copy)
    assert torch.equal(model.unet["out.2.weight"], state["conv_out.weight"].float())


def test_latent_statistics_and_schedule_of_a_folder(copy: Path):
    edit(copy / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.25)
    edit(copy / "scheduler" / "scheduler_config.json", beta_schedule="linear", prediction_type="v_prediction")
    model = sources.read(copy)
    assert (model.mean, model.std, model.prediction) == ([0.25] * 4, [2.0] * 4, "v")
    assert model.schedule == Linear(0.00085, 0.012)
    edit(copy / "vae" / "config.json", latents_mean=[1, 2, 3, 4], latents_std=[4, 3, 2, 1])
    model = sources.read(copy)
    assert (model.mean, model.std) == ([1, 2, 3, 4], [8, 6, 4, 2])


def test_a_file_may_say_what_it_predicts(single: Path, tmp_path: Path):
    with safe_open(single, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
    with pytest.raises(UserError, match=r"--prediction v: .* says of itself that it predicts eps"):
        sources.read(single, "v")
    silent = changed(single, lambda state: None, tmp_path / "silent.safetensors")
    assert sources.read(silent).prediction == "eps"
    assert sources.read(silent, "v").prediction == "v"
    marked = changed(single, lambda state: state.update(v_pred=torch.ones(1)), tmp_path / "marked.safetensors")
    assert sources.read(marked).prediction == "v"


KEY = "model.diffusion_model.out.2.weight"
BAD_KEYS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (lambda s: s.pop(KEY.replace("weight", "bias")), r"misses key out.2.bias \(1 in all\)"),
    "no end": (lambda s: s.pop(KEY), "unknown layout, there is no out.2.weight"),
    "extra": (lambda s: s.update({f"{KEY}.lora": s[KEY].clone()}), "has an unknown key out.2.weight.lora"),
    "foreign": (lambda s: s.update({"control_model.a": torch.ones(1)}), "has an unknown key control_model.a"),
    "another scale": (lambda s: s.update(edm_mean=torch.ones(1)), "has an unknown key edm_mean"),
    "shape": (lambda s: s.update({KEY.replace("weight", "bias"): torch.ones(5)}), r"out.2.bias is \(5,\), expected \(4,\)"),
    "nan": (lambda s: s[KEY].fill_(torch.nan), f"{KEY} holds NaN or infinite values"),
    "twice": (lambda s: s.update({f"module.{KEY}": s[KEY].clone()}), "holds a key twice"),
    "no text": (lambda s: [s.pop(key) for key in list(s) if key.startswith("cond_")], "unknown layout, its first key is first_"),
    "text": (lambda s: s.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
             r"misses key (text_model\.)?final_layer_norm.bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_are_named(single: Path, tmp_path: Path, name: str):
    change, message = BAD_KEYS[name]
    with pytest.raises(UserError, match=message):
        sources.read(changed(single, change, tmp_path / "bad.safetensors"))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "prediction_type=sample is not known; it may be eps",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid is not known"),
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True is not supported",
        ),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type=timestep has no counterpart"),
        ("unet/config.json", {"layers_per_block": 2}, r"copy/unet misses key input_blocks"),
        ("vae/config.json", {"act_fn": "mish"}, "vae/config.json: act_fn=mish"),
        ("vae/config.json", {"latent_channels": 8}, r"copy/vae: .* is \(64, 4, 3, 3\), expected \(64, 8, 3, 3\)"),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, r"misses key (text_model\.)?encoder.layers.3"),
    ],
)
def test_a_folder_that_does_not_fit_its_configs(copy: Path, part: str, values: dict[str, Any], message: str):
    edit(copy / part, **values)
    with pytest.raises(UserError, match=message):
        sources.read(copy)


def test_a_folder_without_its_parts(copy: Path):
    with pytest.raises(UserError, match=r"--prediction v: .* says prediction_type=epsilon"):
        sources.read(copy, "v")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"unet has no diffusion_pytorch_model.safetensors; save .* safe_serialization=True"
    ):
        sources.read(copy)
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*vae/config.json \(JSONDecodeError\)"):
        sources.read(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model_index.json \(FileNotFoundError\)"):
        sources.read(copy)


def test_a_source_that_is_none(tmp_path: Path, single: Path):
    with pytest.raises(UserError, match=r"there is no .*nothing; give a diffusers folder"):
        sources.read(tmp_path / "nothing")
    with pytest.raises(UserError, match="--prediction x0: give eps or v"):
        sources.read(single, "x0")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(UserError, match="no sound safetensors file"):
        sources.read(cut)


def test_pickled_code_is_refused_and_nothing_runs(tmp_path: Path):
    for name, content in {
        "a.ckpt": {"state_dict": {"w": Gadget(tmp_path / "ran")}},
        "b.pt": Gadget(tmp_path / "ran"),
    }.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} holds more than tensors, .*nothing in it was executed"):
            sources.read(tmp_path / name)
    torch.save({"state_dict": {"w": [1, 2]}}, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match="w is a list, not a tensor"):
        sources.read(tmp_path / "c.ckpt")
    torch.save([1], tmp_path / "d.ckpt")
    with pytest.raises(UserError, match=r"d.ckpt holds more than tensors"):
        sources.read(tmp_path / "d.ckpt")
    assert not (tmp_path / "ran").exists()
