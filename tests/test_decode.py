"""A sample's members become the fields of a batch, or a drop with a reason."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from ldm.data.decode import Captions, ClassNumber, DecodeSample, DepthMap
from ldm.data.filters import Between, CaptionLength
from ldm.data.shards import BadSample
from ldm.errors import UserError

TXT = Captions({"txt": 1.0}, seed=0)


def meta(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_captions() -> None:
    assert TXT({"txt": " a cat 😀\n".encode()}, {}, 0) == "a cat 😀"
    for members, reason in [
        ({}, "missing"),
        ({"txt": b""}, "empty"),
        ({"txt": b" \n"}, "empty"),
        ({"txt": b"caf\xe9"}, "not UTF-8"),
        ({"txt": b"a" * 100_000}, "too long"),
    ]:
        with pytest.raises(BadSample, match=f"caption/{reason}"):
            TXT(members, {}, 0)


def test_one_of_several_captions_is_drawn_by_weight_among_those_there_are() -> None:
    captions = Captions({"txt": 1.0, "blip": 2.0, "cogvlm_caption": 1.0}, seed=3)
    members, row = {"txt": b"t", "blip": b"b"}, {"cogvlm_caption": "c"}
    drawn = [captions(members, row, i) for i in range(2000)]
    assert [abs(drawn.count(c) / 2000 - share) < 0.04 for c, share in [("t", 0.25), ("b", 0.5), ("c", 0.25)]] == [
        True
    ] * 3
    assert drawn == [captions(members, row, i) for i in range(2000)]
    assert {captions({"blip": b"b"}, {"cogvlm_caption": 5}, i) for i in range(20)} == {"b"}
    assert abs(sum(captions({"txt": b"t"}, row, i) == "t" for i in range(2000)) / 2000 - 0.5) < 0.04


@pytest.mark.parametrize("weights", [{}, {"txt": 0.0}, {"txt": 1.0, "blip": -1.0}])
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"data.captions=.*weight above 0"):
        Captions(weights, 0)


def test_a_sample_needs_both() -> None:
    decode = DecodeSample(16)
    fields = decode("k", {"png": picture(1, format="PNG"), "txt": b"a"}, 0)
    assert fields["image"].shape == (3, 16, 16)
    assert fields["caption"] == "a"
    assert fields["original_size"].tolist() == [16, 20]
    assert fields["crop"].tolist() == [0, 2]
    with pytest.raises(BadSample, match="image/missing"):
        decode("k", {"txt": b"a", "pkl": b"cos\nsystem\n"}, 0)
    with pytest.raises(BadSample, match="caption/missing"):
        decode("k", {"jpg": picture(1)}, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "unreadable"),
        (b"[1]", "not an object"),
        (b"[" * 100_000, "unreadable"),
        (b" " * 2**21, "too long"),
        (b"\xff", "unreadable"),
    ],
)
def test_bad_json(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=f"json/{reason}"):
        DecodeSample(16)("k", {"jpg": picture(1), "txt": b"a", "json": data}, 0)


def test_the_size_before_img2dataset_resized_it() -> None:
    members = {
        "jpg": picture(1),
        "txt": b"a",
        "json": meta(width=20, height=16, original_width=2000, original_height=1600),
    }
    assert DecodeSample(16)("k", members, 0)["original_size"].tolist() == [1600, 2000]


def test_filters_are_asked_in_order_before_the_picture_is_decoded() -> None:
    filters = {"length": CaptionLength(2, 9), "score": Between("aesthetic", keep_missing=False, low=5)}
    decode = DecodeSample(16, filters=filters)
    bad = {"jpg": b"", "txt": b"a", "json": meta(AESTHETIC_SCORE=1)}
    with pytest.raises(BadSample, match="filter/length"):
        decode("k", bad, 0)
    with pytest.raises(BadSample, match="filter/score"):
        decode("k", bad | {"txt": b"abc"}, 0)
    with pytest.raises(BadSample, match="image/empty"):
        decode("k", bad | {"txt": b"abc", "json": meta(AESTHETIC_SCORE="5.5")}, 0)


def test_without_augmentation() -> None:
    decode = DecodeSample(16, random_crop=True, random_flip=True, filters={"length": CaptionLength(2, 9)})
    plain = decode.without_augmentation()
    members = {"jpg": picture(1, 40, 16), "txt": b"abc"}
    assert len({tuple(decode("k", members, i)["crop"].tolist()) for i in range(20)}) > 1
    assert all(torch.equal(plain("k", members, i)["image"], plain("k", members, 0)["image"]) for i in range(20))
    with pytest.raises(BadSample, match="filter/length"):
        plain("k", members | {"txt": b"a"}, 0)


def test_one_without_a_weight_is_left_out() -> None:
    assert Captions({"txt": None, "cls": 1.0}, seed=0)({"txt": b"a", "cls": b"7"}, {}, 0) == "7"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "missing"),
        ({"cls": b"cat"}, "not a number"),
        ({"cls": b"10"}, "out of range"),
        ({"cls": b"-1"}, "out of range"),
    ],
)
def test_bad_classes(members: dict[str, bytes], reason: str) -> None:
    decode = DecodeSample(16, fields={"label": ClassNumber(10)})
    assert decode("k", {"jpg": picture(1), "txt": b"a", "cls": b"9\n"}, 0)["label"] == 9
    with pytest.raises(BadSample, match=f"label/{reason}"):
        decode("k", {"jpg": picture(1), "txt": b"a"} | members, 0)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("finer", [1, 3])
def test_a_depth_map_is_cropped_and_mirrored_as_its_picture(finer: int) -> None:
    """The map is the picture's own first channel, at its resolution or another: they stay together."""
    ramp = np.add.outer(np.arange(24), 4 * np.arange(40)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.repeat(ramp[..., None], 3, 2)).save(file, "PNG")
    depth = np.add.outer(np.arange(24 * finer), 4 * np.arange(40 * finer)).astype(np.float16) / finer
    decode = DecodeSample(16, random_crop=True, random_flip=True, fields={"depth": DepthMap()})
    members = {"png": file.getvalue(), "txt": b"a", "depth.npy": npy(depth)}
    for index in range(20):
        got = decode("k", members, index)
        assert (got["depth"].shape, got["depth"].dtype) == ((1, 16, 16), torch.float32)
        inside = (got["depth"][0] - got["image"][0].float())[2:-2, 2:-2]  # at the borders bicubic filters differ
        assert inside.abs().max() < 3
    assert torch.equal(decode("k", members | {"depth.npy": npy(depth[None])}, 19)["depth"], got["depth"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable"),
        (b"\x93NUMPY\x01\x00", "unreadable"),
        (npy(np.zeros((4, 4)))[:-9], "unreadable"),
        (npy(np.array([{}], dtype=object)), "unreadable"),
        (npy(np.zeros(16)), "wrong shape or type"),
        (npy(np.zeros((2, 4, 4))), "wrong shape or type"),
        (npy(np.zeros((0, 4))), "wrong shape or type"),
        (npy(np.zeros((4, 4), complex)), "wrong shape or type"),
        (npy(np.full((4, 4), np.nan)), "not finite"),
    ],
)
def test_bad_depth_maps(data: bytes, reason: str) -> None:
    decode = DecodeSample(16, fields={"depth": DepthMap()})
    with pytest.raises(BadSample, match=f"depth/{reason}"):
        decode("k", {"jpg": picture(1), "txt": b"a", "depth.npy": data}, 0)
    with pytest.raises(BadSample, match="depth/missing"):
        decode("k", {"jpg": picture(1), "txt": b"a"}, 0)
