import pytest
import torch
from diffusers import VQModel
from test_config import composed
from torch import Tensor

from ldm import config
from ldm.keyed_random import KeyedRandom
from ldm.models.autoencoder_vq import AutoencoderVQ
from ldm.models.first_stage import FirstStage
from ldm.models.quantizer import VectorQuantizer


def vq(**options: object) -> AutoencoderVQ:
    torch.manual_seed(0)
    network = AutoencoderVQ(3, VectorQuantizer(8, 3, **options), 4, [1, 2], blocks=1, groups=2)
    torch.nn.init.normal_(network.quantize.embedding.weight)
    return network


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.mark.parametrize(
    ("name", "widths", "attention", "codes", "z"),
    [
        ("vq_f4", (128, 256, 512), (), 8192, 3),
        ("vq_f8", (128, 256, 256, 512), (3,), 16384, 4),
        ("vq_f8_n256", (128, 256, 256, 512), (3,), 256, 4),
        ("vq_f16", (128, 128, 256, 256, 512), (4,), 16384, 8),
    ],
)
def test_the_zoo_s_parameter_counts_equal_diffusers_of_the_same_structure(
    name: str, widths: tuple[int, ...], attention: tuple[int, ...], codes: int, z: int
):
    kinds = ["Attn" * (i in attention) for i in range(len(widths))]
    data = ["name=x", "trainer.max_steps=1", "data.shards=a", "data.val_shards=b", "data.side=32", "data.batch_size=4"]
    cfg = composed("train", "model=autoencoder", f"model/autoencoder={name}", *data)
    with torch.device("meta"):
        network = config.build(cfg.model.autoencoder)
        peer = VQModel(
            down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds], block_out_channels=widths,
            up_block_types=[f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]], layers_per_block=2, latent_channels=z,
            num_vq_embeddings=codes, vq_embed_dim=z,
        )  # fmt: skip
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in peer.parameters())


def test_what_training_decodes_is_what_decoding_the_latents_gives():
    network = vq().eval()
    coded = network.code(images(2), KeyedRandom(0, torch.arange(2)))
    assert coded.name == "codebook"
    assert coded.penalty.shape == (2,)
    whole = network.decode(network.encode(images(2)).mean)
    torch.testing.assert_close(network.decode_coded(coded.latents), whole)


def test_gradients_reach_encoder_decoder_and_codebook():
    network = vq()
    coded = network.code(images(2), KeyedRandom(0, torch.arange(2)))
    (network.decode_coded(coded.latents).square().mean() + coded.penalty.mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_a_codebook_of_averages_learns_in_training_mode_alone():
    network = vq(decay=0.9)
    random, before = KeyedRandom(0, torch.arange(2)), network.quantize.embedding.weight.clone()
    network.eval().code(images(2), random)
    assert torch.equal(network.quantize.embedding.weight, before)
    network.train().code(images(2), random)
    assert not torch.equal(network.quantize.embedding.weight, before)
    before = network.quantize.embedding.weight.clone()
    network.freeze_encoder()
    network.code(images(2), random)
    assert torch.equal(network.quantize.embedding.weight, before)
    assert {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad} == {
        "decoder", "post_quant_conv",
    }  # fmt: skip


def test_as_a_first_stage_latents_are_the_vectors_before_quantization():
    network = vq()
    stage = FirstStage(network, mean=[0.5, 0.0, 0.0], std=[2.0, 1.0, 1.0])
    pictures = (images(2) * 127 + 128).to(torch.uint8)
    latents = stage.latents({"image": pictures}, KeyedRandom(0, torch.arange(2)))
    with torch.no_grad():
        vectors = network.encode(pictures.float() / 127.5 - 1).mean
        torch.testing.assert_close(latents * stage.std + stage.mean, vectors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stage.decode(latents), network.decode(vectors), rtol=1e-4, atol=1e-4)


def test_code_counts():
    network = vq()
    counts = network.count(network.encode(images(3)))
    assert counts.sum() == 3 * 16
    assert set(network.measures(counts)) == {"usage", "perplexity"}
