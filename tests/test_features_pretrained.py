"""Tiny CLIPs and a DINOv2 with random weights, saved as the real ones are."""

import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from test_config import composed
from torch import Tensor

from ldm import config
from ldm.errors import UserError
from ldm.evaluation.features_pretrained import CLIP, DINOv2, OpenCLIP
from ldm.evaluation.measures import clip_score
from ldm.evaluation.metrics import FeatureMetrics

CAPTIONS = ["a small red circle", "two dogs on a sofa, watercolor", "word " * 100]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def pictures(n: int = 3, side: int = 40) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**SIZES, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**SIZES, "image_size": 32, "patch_size": 8}, projection_dim=12,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("weights") / "clip_tiny"
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    return folder


def test_clip_s_score_is_transformers_own_cosine(clip: Path):
    images = pictures()
    metric = FeatureMetrics(CLIP(str(clip)), [clip_score])
    for i in range(3):
        metric.update(images[i : i + 1], CAPTIONS[i : i + 1], None)
    values = metric.compute()

    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=open_clip.tokenize(CAPTIONS), pixel_values=pixels["pixel_values"])
        cosine = (out.image_embeds * out.text_embeds).sum(dim=1)
    assert values["clip_cosine/clip_tiny"] == pytest.approx(float(cosine.mean()), abs=2e-3 * float(cosine.abs().max()))
    assert values["clip_cosine_x100/clip_tiny"] == pytest.approx(100 * values["clip_cosine/clip_tiny"])


def test_clip_s_embeddings_are_transformers_own_on_the_same_pixels(clip: Path):
    network, images = CLIP(str(clip)), pictures(side=32)  # nothing to resize
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    mean, std = (torch.tensor(getattr(transformers.image_utils, f"OPENAI_CLIP_{name}")) for name in ("MEAN", "STD"))
    pixels = (images / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        out = model(input_ids=open_clip.tokenize(CAPTIONS), pixel_values=pixels)
    for ours, theirs in ((network(images), out.image_embeds), (network.text(CAPTIONS), out.text_embeds)):
        assert torch.allclose(torch.nn.functional.normalize(ours, dim=1), theirs, atol=1e-5)


def test_open_clip_equals_the_library_s_own_pipeline(tmp_path: Path):
    torch.manual_seed(0)
    config = {"embed_dim": 12, "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}}  # fmt: skip
    folder = tmp_path / "open_tiny"
    folder.mkdir()
    shape = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": shape}))
    source = open_clip.model.CLIP(**config)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, folder / "open_clip_model.safetensors")

    network, images = OpenCLIP(str(folder)), pictures()
    assert (network.name, network.side, list(network.mean)) == ("open_tiny", 32, shape["mean"])
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        seen, read = model.eval().encode_image(pixels), model.encode_text(open_clip.tokenize(CAPTIONS))
    assert torch.allclose(network.text(CAPTIONS), read, atol=1e-5)
    assert (network(images) - seen).abs().max() < 2e-2 * seen.abs().max()  # Pillow rounds otherwise here and there

    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"open_tiny.* cannot be read safely: "):
        OpenCLIP(str(folder))


def test_dinov2_gives_the_class_token_after_the_last_norm(tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, patch_size=14)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino_tiny")
    network, images = DINOv2(str(tmp_path / "dino_tiny")), pictures(2, 224)
    mean, std = (
        np.array(part, dtype=np.float32).reshape(1, 3, 1, 1) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pixels = torch.from_numpy((images.numpy() / np.float32(255) - mean) / std)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert network.name == "dino_tiny"
    assert torch.allclose(network(images), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["clip_l", "openclip_h", "dinov2"])
def test_the_shipped_metrics_are_built_on_them(name: str, clip: Path, monkeypatch: pytest.MonkeyPatch):
    """On the tiny CLIP, where the class does not read it in its own way."""
    for kind in ("OpenCLIP", "DINOv2"):
        monkeypatch.setattr(f"ldm.evaluation.features_pretrained.{kind}", CLIP)
    words = [f"metrics={name}", f"metrics.{name}.features.weights={clip}"]
    (metric,) = config.build_each(composed("train", "experiment=demo", *words).metrics)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            metric.update(pictures(), CAPTIONS, pictures().flip(3))
        values = metric.compute()
    expected = ("frechet", "precision") if name == "dinov2" else ("clip_cosine", "clip_cosine_x100", "cmmd")
    assert {f"{part}/clip_tiny" for part in expected} <= values.keys()


def test_missing_weights_are_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    for kind, name in ((CLIP, "clip_l"), (OpenCLIP, "openclip_h"), (DINOv2, "dinov2")):
        with pytest.raises(UserError, match=f"ldm fetch {name}"):
            kind()


def test_lacking_weights_are_refused(clip: Path, tmp_path: Path):
    from safetensors.torch import load_file

    state = load_file(clip / "model.safetensors")
    gone = min(state)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    with pytest.raises(UserError, match="lacks weights of this network, the first is "):
        CLIP(str(tmp_path))
