"""From diffusers to a run and back: the same pictures and the same bits, at every door."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipelines
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from omegaconf import OmegaConf
from test_cli import ldm
from tiny import here
from torch import Tensor

from ldm import config
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.schedules import grid
from ldm.errors import UserError
from ldm.interop import exporting, files, importing, sources
from ldm.models.conditioners import TextConditioner
from ldm.models.text import TransformerText, bpe
from ldm.models.text_pretrained import CLIPText, OpenCLIPText
from ldm.training import checkpointing

CAPTIONS = ["a red circle", "blue square on the sky"]
Z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
KINDS = {"sd1": {}, "sd2": {"prediction_type": "v_prediction"}, "sdxl": {}}
Run = SimpleNamespace  # kind, source, path, pictures: the pipeline's own, out, single: exported


def pictures(run: Path, steps: int) -> Tensor:
    """Through our own denoiser, guidance and solver, from the pure noise Z."""
    module, _ = config.load_run(run)
    sampling = config.build(config.run_config(run).sampling)
    sigmas = grid(sampling.schedule, steps, sampling.spacing)
    with torch.no_grad():
        cond = module.conditioner({"caption": CAPTIONS})
        denoise = Guidance(7.5)(module.denoiser, cond, module.conditioner.null(2, cond))
        z = sampling.solver(denoise, Z * (1 + sigmas[0] ** 2).sqrt(), sigmas)
        return (module.first_stage.decode(z) / 2 + 0.5).clamp(0, 1)


def everything(run: Path) -> dict[str, Tensor]:
    module, _ = config.load_run(run)
    return module.state_dict()


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A pipeline saved by diffusers, imported, and exported again."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    source = pipelines.saved(kind, folder, **KINDS[kind])
    importing.write_run(sources.read(source), folder / "run", source)
    exporting.export(folder / "run", folder / "out", "diffusers")
    exporting.export(folder / "run", folder / "single.safetensors", "single-file")
    return Run(kind=kind, source=source, path=folder / "run", out=folder / "out", single=folder / "single.safetensors")


def test_an_imported_run_draws_the_pipelines_pictures(run: Run):
    kind = StableDiffusionXLPipeline if run.kind == "sdxl" else StableDiffusionPipeline
    theirs = pipelines.pictures(pipelines.quiet(kind.from_pretrained(run.source)), Z, CAPTIONS, 20)
    ours = pictures(run.path, 20)
    assert theirs.std() > 0.1
    assert (theirs[0] - theirs[1]).abs().max() > 0.1  # the captions matter
    assert (ours - theirs).abs().max() < 2 / 255


def test_exports_load_in_diffusers_and_draw_the_same(run: Run):
    kind = StableDiffusionXLPipeline if run.kind == "sdxl" else StableDiffusionPipeline
    loaded = [kind.from_pretrained(run.source), kind.from_pretrained(run.out),
              kind.from_single_file(str(run.single), config=str(run.out), local_files_only=True)]  # fmt: skip
    first, *others = (pipelines.pictures(pipelines.quiet(pipe), Z, CAPTIONS, 3) for pipe in loaded)
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("exported", ["out", "single"])
def test_import_export_import_keeps_every_bit(run: Run, tmp_path: Path, exported: str):
    importing.write_run(sources.read(getattr(run, exported)), tmp_path / "again", getattr(run, exported))
    before, after = everything(run.path), everything(tmp_path / "again")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    parameterization = config.run_config(run.path).model.parameterization
    assert config.run_config(tmp_path / "again").model.parameterization == parameterization


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.imported("sd1", tmp_path_factory.mktemp("imported"))


@pytest.fixture(scope="module")
def trained(imported: Path, tiny_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.py for two steps: its own U-Net on a first stage with statistics for each channel, and frozen CLIP."""
    folder = tmp_path_factory.mktemp("trained")
    model = replace(sources.read(imported.parent / "sd1"), mean=[0.5, -1.0, 0.0, 0.25], std=[2.0, 0.5, 1.0, 3.0])
    importing.write_first_stage(model, folder / "first_stage", imported)
    schedule = "{_target_: ldm.diffusion.schedules.ScaledLinear}"
    label = f"{{_target_: ldm.diffusion.schedules.ScaledLinear.index, _partial_: true, _args_: [{schedule}]}}"
    assert here(
        "train.py", "name=trained", f"run_dir={folder}/run", f"data.shards={tiny_shards}", "data.side=16", "data.batch_size=4",
        "data.num_workers=0", "data.val_samples=4", "trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2",
        "model/backbone=unet_sd1", "model.backbone.channels=32", "model.backbone.multipliers=[1,2]",
        "model.backbone.depths=[1,0]", "model.backbone.blocks=1", "model.backbone.context_channels=64",
        "model/loss=scaled_linear", "model/parameterization=v", f"+model.parameterization.noise_label={label}",
        "model/conditioner=clip_l", f"model.conditioner.encoder.weights={imported}/text_encoder",
        f"+model.conditioner.encoder.tokenizer={imported}/tokenizer", "logger=none", "callbacks.pictures=null",
        "callbacks.progress=null", f"model.first_stage.run={folder}/first_stage", "model.optimizer.lr=0.01",
        "sampling/schedule=scaled_linear", "sampling/spacing=leading", "sampling/solver=ddim",
    ) == 0  # fmt: skip
    return folder / "run"


def test_a_run_trained_here_is_exported_with_the_statistics_of_each_channel(trained: Path, tmp_path: Path):
    exporting.export(trained, tmp_path / "out", "diffusers")
    exporting.export(trained, tmp_path / "out.safetensors", "single-file")
    folder = pipelines.quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "out"))
    assert (folder.vae.config.scaling_factor, folder.scheduler.config.prediction_type) == (1.0, "v_prediction")
    single = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "out.safetensors"), config=str(tmp_path / "out"), local_files_only=True
    )
    single.vae.register_to_config(scaling_factor=0.18215)  # the layout's own, where that folder says 1
    ours = pictures(trained, 20)
    for pipe in (folder, pipelines.quiet(single)):
        assert (pipelines.pictures(pipe, Z, CAPTIONS, 20) - ours).abs().max() < 2 / 255
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| predicts | v_prediction |" in card
    assert 'from_single_file("out.safetensors")' in (tmp_path / "out.md").read_text()
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stage = config.load_run(trained)[0].first_stage
    with torch.no_grad():
        posterior = stage.autoencoder.encode(images)
        theirs = folder.vae.encode(images).latent_dist
        torch.testing.assert_close(theirs.mean, (posterior.mean - stage.mean) / stage.std, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.std, (posterior.logvar / 2).exp() / stage.std, rtol=1e-4, atol=1e-5)


def test_weights_and_dtype(trained: Path, tmp_path: Path):
    checkpoint = checkpointing.read(checkpointing.newest(trained))
    key = "denoiser.backbone.out.2.weight"
    expected = {"ema": checkpoint["ema"]["weights"][key], "raw": checkpoint["state_dict"][key]}
    assert not torch.equal(expected["ema"], expected["raw"])
    for weights in ("ema", "raw"):
        exporting.export(trained, tmp_path / weights, "diffusers", weights, "float16")
        assert torch.equal(sources.read(tmp_path / weights).unet["out.2.weight"], expected[weights].half().float())
    assert sum(p.stat().st_size for p in (tmp_path / "raw").rglob("*.safetensors")) < 1e7


def test_the_command_line(imported: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, tiny_val: str):
    source, out, back = imported.parent / "sd1", tmp_path / "run", tmp_path / "back"
    assert ldm(capsys, monkeypatch, "import", source, out) == (0, f"{out}: a run that predicts eps, of 16 px\n", "")
    assert ldm(capsys, monkeypatch, "export", out, back) == (0, f"{back}: written, read back, and the same\n", "")
    code, stdout, stderr = ldm(capsys, monkeypatch, "import", source, out)
    assert (code, stdout) == (2, "")
    assert stderr == f"error: {out} is not empty; give a new directory\n"
    for words, message in {
        ("import", source, tmp_path / "x", "--prediction", "flow"): "--prediction flow: give eps or v",
        ("export", out, back): f"{back} is there already; give another name, or delete it",
        ("export", out, tmp_path / "y", "--to", "onnx"): "--to onnx: give diffusers or single-file",
        ("export", out, tmp_path / "y", "--weights", "best"): "--weights best: give ema or raw",
        ("export", out, tmp_path / "y", "--dtype", "int8"): "--dtype int8: give float32 or float16",
        ("export", out, tmp_path / "y", "--to", "single-file"): f"{tmp_path}/y: --to single-file wants OUT to end in",
        ("export", out / "first_stage", tmp_path / "y"): "model is a AutoencoderModule: what is exported has",
    }.items():
        code, _, stderr = ldm(capsys, monkeypatch, *words)
        assert (code, len(stderr.splitlines())) == (2, 1)
        assert stderr.startswith(f"error: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "run"]
    assert here("evaluate.py", f"checkpoint={out}", f"data.shards={tiny_val}", f"data.val_shards={tiny_val}", "n=2",
                "sampling.steps=2") == 0  # fmt: skip
    assert "frechet" in capsys.readouterr().out


def test_models_that_no_run_can_hold_are_refused(imported: Path, tmp_path: Path):
    model = sources.read(imported.parent / "sd1")
    nine = replace(model, unet_arguments=model.unet_arguments | {"in_channels": 9})
    with pytest.raises(UserError, match="its U-Net takes 9 channels and the first stage gives 4"):
        importing.write_run(nine, tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone.noise_scale", 10.0, "model.backbone.noise_scale=10.0: diffusers' U-Net cannot"),
        ("parameterization.noise_label", None, "model.parameterization.noise_label is not the index of"),
        (
            "parameterization",
            {"_target_": "ldm.diffusion.parameterization.Flow"},
            "model.parameterization is a Flow: .* Eps or V",
        ),
        ("conditioner.encoder.chunks", 2, "model.conditioner.encoder.chunks is 2: others can only express 1"),
        ("conditioner.encoder.attend_to_padding", False, "encoder.attend_to_padding is False"),
        ("conditioner.encoder.final_norm", False, "encoder.final_norm is False"),
        ("conditioner.encoder.layer", -3, "encoder.layer is -3"),
        ("conditioner.encoder.pad", 5, "model.conditioner.encoder.pad: the tokenizer has its own padding"),
        ("conditioner.pooled", True, "model.conditioner.pooled is True"),
        (
            "conditioner.to_null",
            {"_target_": "ldm.models.conditioners.Zeros"},
            r"model.conditioner.to_null is .*Zeros.* can only express .*Identity",
        ),
    ],
)
def test_what_others_cannot_express_is_refused_by_argument(
    imported: Path, tmp_path: Path, key: str, value: Any, message: str
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(imported / "checkpoints")
    cfg = config.run_config(imported)
    if value is None:
        del cfg.model.parameterization["noise_label"]
    else:
        OmegaConf.update(cfg, f"model.{key}", value, merge=False, force_add=True)
    OmegaConf.save(cfg, run / "config.yaml")
    with pytest.raises(UserError, match=message):
        exporting.export(run, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_a_trained_text_encoder_of_our_own_is_refused():
    conditioner = TextConditioner(TransformerText(8, 1, 1))
    with pytest.raises(
        UserError, match=r"model.conditioner.encoder is a TransformerText: .* has CLIPText or OpenCLIPText"
    ):
        exporting.texts(conditioner, OmegaConf.create({"encoder": {}}))


@pytest.mark.parametrize("layer", [-1, -2])
def test_open_clip_is_exported_as_clip_in_transformers_layout(tmp_path: Path, layer: int):
    """The last layer but one, normalized, is the last of an encoder with one layer less: Stable Diffusion v2's."""
    tower = {"embed_dim": 32, "text_cfg": {"width": 64, "heads": 1, "layers": 3}}
    encoder = OpenCLIPText(config=tower, layer=layer, attend_to_padding=True)
    pipelines.seeded(encoder.model, 1)
    (text,), sizes, zero_null = exporting.texts(TextConditioner(encoder), OmegaConf.create({"encoder": {}}))
    assert (sizes, zero_null, text.config["num_hidden_layers"]) == (None, False, 4 + layer)
    files.write_text(text, tmp_path / "text_encoder", tmp_path / "tokenizer", torch.float32)
    back = CLIPText(str(tmp_path / "text_encoder"), tokenizer=str(tmp_path / "tokenizer"), attend_to_padding=True)
    with torch.no_grad():
        torch.testing.assert_close(back(CAPTIONS)[0], encoder(CAPTIONS)[0], rtol=1e-4, atol=1e-4)


def test_a_single_file_cannot_say_another_null(tmp_path: Path):
    source = pipelines.saved("sdxl", tmp_path)
    index = source / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    importing.write_run(sources.read(source), tmp_path / "run", source)
    exporting.export(tmp_path / "run", tmp_path / "out", "diffusers")
    assert not sources.read(tmp_path / "out").zero_null
    with pytest.raises(UserError, match="zero_null is False; what was written reads back as True"):
        exporting.export(tmp_path / "run", tmp_path / "out.safetensors", "single-file")
    assert not list(tmp_path.glob("*.safetensors"))


def test_weights_beyond_half_precision_leave_nothing_behind(imported: Path, tmp_path: Path):
    run = shutil.copytree(imported, tmp_path / "run")
    path = checkpointing.newest(run)
    checkpoint = checkpointing.read(path)
    checkpoint["ema"]["weights"]["denoiser.backbone.out.2.weight"].fill_(1e6)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"conv_out.weight holds NaN or infinite values"):
        exporting.export(run, tmp_path / "out", "diffusers", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("pad", [0, 49407])
def test_clips_own_byte_pairs_as_a_tokenizer_of_transformers(tmp_path: Path, pad: int):
    """open_clip's vocabulary, written for transformers, cuts the same captions into the same tokens."""
    from transformers import CLIPTokenizer

    text = sources.Text({"a": torch.ones(1)}, {"max_position_embeddings": 77}, None, pad)
    files.write_text(text, tmp_path / "text_encoder", tmp_path / "tokenizer", torch.float32)
    words = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (words.model_max_length, words.pad_token_id) == (77, pad)
    # as a special token, which padding is, "!" would be one wherever it stands; so it is in the published tokenizers too
    for caption in ("", "A photograph of 2 red-haired astronauts, riding horses (on the moon).", "weiß ☕ 日本 it's"):
        expected = [bpe().sot_token_id, *bpe().encode(caption), bpe().eot_token_id]
        assert words(caption).input_ids == expected
