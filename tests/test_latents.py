"""The cache's reader: what it gives, and what becomes of samples and folders that are not as their stamp says."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached import CACHE, encode, members, write_source
from conftest import write_tar
from tiny import SIDE

from ldm.data.filters import Between
from ldm.data.latents import DecodeLatents, Stamp, from_npy, read_null, to_npy
from ldm.data.shards import BadSample
from ldm.data.stream import OrderedSamples
from ldm.errors import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache")
    encode(write_source(tmp_path_factory.mktemp("source"), 1), out)
    return out


def read(folder: Path) -> dict[str, dict[str, bytes]]:
    """key -> members of the first shard."""
    out: dict[str, dict[str, bytes]] = {}
    with tarfile.open(folder / "00000.tar") as tar:
        for header in tar:
            key, _, extension = header.name.partition(".")
            out.setdefault(key, {})[extension] = tar.extractfile(header).read()
    return out


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_arrays_are_numpy_files():
    array = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    assert to_npy(array) == npy(array)
    assert np.array_equal(np.load(io.BytesIO(to_npy(array)), allow_pickle=False), array)
    assert np.array_equal(from_npy(npy(array), (2, 3, 4)), array)
    assert to_npy(array[:, :, ::2]) == npy(array[:, :, ::2].copy())


def test_a_sample_s_fields(cache: Path):
    samples = read(cache)
    fields = DecodeLatents(str(cache), SIDE)("000000003", samples["000000003"], 0)
    stored = {name.partition("-")[0]: data for name, data in samples["000000003"].items()}
    moments = np.load(io.BytesIO(stored["moments"]), allow_pickle=False)
    assert moments.shape == (2, 4, 4, 4)
    assert fields["moments"].dtype == torch.float16
    assert np.array_equal(fields["moments"], moments[0])
    assert fields["original_size"].tolist() == [90, 103]  # of the .json
    assert fields["text_mask"].tolist() == [True, True, True, False]
    assert not fields["text_tokens"][3].any()
    assert fields["text_tokens"].shape == (4, 8)
    size = DecodeLatents(str(cache), SIDE)("k", samples["000000004"], 0)["original_size"]
    assert size.tolist() == [12, 14]  # of the picture
    fields["moments"] += 1  # its own memory


def test_mirrored_by_the_sample_s_number(cache: Path):
    sample = read(cache)["000000003"]
    decode = DecodeLatents(str(cache), SIDE, random_flip=True, seed=5)
    seen = {decode.image.mirrored(i): decode("k", sample, i)["moments"] for i in range(20)}
    views = np.load(io.BytesIO(next(data for name, data in sample.items() if name.startswith("moments"))))
    assert all(np.array_equal(seen[flag], views[int(flag)]) for flag in (False, True))
    plain = decode.without_augmentation()
    assert all(torch.equal(plain("k", sample, i)["moments"], seen[False]) for i in range(20))


def spoiled(sample: dict[str, bytes], kind: str, data: bytes | None) -> dict[str, bytes]:
    """The sample with the member of that kind replaced, or without it."""
    name = next(name for name in sample if name.partition("-")[0] == kind)
    return {k: v for k, v in sample.items() if k != name} | ({} if data is None else {name: data})


NAN = np.full((2, 4, 4, 4), np.nan, np.float16)


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        ("moments", b"", "latent/wrong shape or type"),
        ("moments", b"<html>", "latent/wrong shape or type"),
        ("moments", npy(np.zeros((2, 4, 4, 4), np.float16))[:-1], "latent/wrong shape or type"),
        ("moments", npy(np.zeros((2, 4, 4, 4), np.float16)) + b"0", "latent/wrong shape or type"),
        ("moments", npy(np.zeros((1, 4, 4, 4), np.float16)), "latent/wrong shape or type"),
        ("moments", npy(np.zeros((2, 4, 2, 8), np.float16)), "latent/wrong shape or type"),
        ("moments", npy(np.zeros((2, 4, 4, 2), np.float32)), "latent/wrong shape or type"),
        ("moments", npy(np.zeros((2, 4, 4, 4), np.int16)), "latent/wrong shape or type"),
        ("moments", npy(np.zeros((2, 4, 4, 4), ">f2")), "latent/wrong shape or type"),
        ("moments", npy(np.asfortranarray(np.zeros((2, 4, 4, 4), np.float16))), "latent/wrong shape or type"),
        ("moments", npy(np.array([{"a": 1}], object)), "latent/wrong shape or type"),
        ("moments", npy(NAN), "latent/not finite"),
        ("moments", npy(np.full((2, 4, 4, 4), np.inf, np.float16)), "latent/not finite"),
        ("tokens", npy(np.zeros((5, 8), np.float16)), "latent/wrong shape or type"),
        ("tokens", npy(np.zeros((0, 8), np.float16)), "latent/wrong shape or type"),
        ("tokens", npy(np.zeros((2, 7), np.float16)), "latent/wrong shape or type"),
        ("tokens", b"", "latent/wrong shape or type"),
        ("tokens", npy(np.full((2, 8), np.nan, np.float16)), "latent/not finite"),
        ("tokens", None, "text/missing"),
        ("vector", None, "text/missing"),
        ("vector", npy(np.zeros(7, np.float16)), "latent/wrong shape or type"),
        ("txt", None, "caption/missing"),
        ("txt", b"caf\xe9", "caption/not UTF-8"),
        ("json", None, "latent/no size and crop"),
        ("json", b"[]", "json/not an object"),
        ("json", b'{"cached": 3}', "latent/no size and crop"),
        ("json", b'{"cached": {"original_size": [1, true], "crop": [0, 0]}}', "latent/no size and crop"),
        ("json", b'{"cached": {"original_size": [1], "crop": [0, 0]}}', "latent/no size and crop"),
    ],
)
def test_a_sample_that_is_not_as_the_stamp_says(cache: Path, kind: str, data: bytes | None, reason: str):
    with pytest.raises(BadSample, match=f"^{reason}$"):
        DecodeLatents(str(cache), SIDE)("k", spoiled(read(cache)["000000003"], kind, data), 0)


def test_one_bad_sample_is_one_counted_drop(cache: Path, tmp_path: Path):
    samples = read(cache)
    samples["000000002"] = spoiled(samples["000000002"], "moments", npy(NAN))
    path = write_tar(
        tmp_path / "0.tar", [(f"{k}.{name}", data) for k, s in samples.items() for name, data in s.items()]
    )
    (batch,) = OrderedSamples([str(path)], DecodeLatents(str(cache), SIDE), CACHE).batches(16)
    assert batch["moments"].shape == (8, 4, 4, 4)
    assert batch["dropped"] == {"latent/not finite": 1}
    assert batch["dropped_where"]["latent/not finite"].endswith("0.tar: 000000002")


def test_samples_of_another_cache_end_the_run(cache: Path):
    sample = read(cache)["000000003"]
    other = {name.replace("moments-", "moments-0000"): data for name, data in sample.items()}
    for decode in (DecodeLatents(str(cache), SIDE), DecodeLatents(str(cache), SIDE).without_augmentation()):
        with pytest.raises(
            UserError, match=r"sample k has no moments-\w{12}.npy but .*moments-0000.* not of the cache"
        ):
            decode("k", other, 0)


def test_pictures_are_taken_in_validation_only(cache: Path):
    decode = DecodeLatents(str(cache), SIDE)
    with pytest.raises(UserError, match=r"sample k has no moments-.* but jpg, json, txt"):
        decode("k", members(3), 0)
    fields = decode.without_augmentation()("k", members(3), 0)
    assert fields["image"].shape == (3, SIDE, SIDE)


def test_filters_see_the_source_s_record(cache: Path):
    decode = DecodeLatents(str(cache), SIDE, filters={"aesthetic": Between("aesthetic", keep_missing=False, low=0.5)})
    decode("k", read(cache)["000000006"], 0)
    for key in ("000000004", "000000003"):  # 0.4, missing
        with pytest.raises(BadSample, match="filter/aesthetic"):
            decode("k", read(cache)[key], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 16}, r"was encoded at 8 px, data.side=16: set data.side=8"),
        ({"random_crop": True}, r"random_crop=true, but .* holds center crops"),
        ({"captions": {"txt": 1.0, "blip": 1.0}}, r"captions=.* holds encodings of txt"),
        ({"folder": "/nowhere"}, r"/nowhere/cache.json cannot be read .*; make it with ldm shards encode"),
    ],
)
def test_what_the_cache_cannot_give(cache: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        DecodeLatents(**{"folder": str(cache), "side": SIDE, **changes})


def test_flips_that_were_not_encoded(tmp_path: Path):
    (tmp_path / "source").mkdir()
    encode(write_source(tmp_path / "source", 1), tmp_path / "out", flip=False)
    DecodeLatents(str(tmp_path / "out"), SIDE)
    with pytest.raises(UserError, match=r"random_flip=true, but .* encode with `ldm shards encode --flip"):
        DecodeLatents(str(tmp_path / "out"), SIDE, random_flip=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 1, "text": 3}'])
def test_a_damaged_stamp(tmp_path: Path, content: str):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=r"cache.json is (damaged|of another format)"):
        Stamp.read(tmp_path)


def test_the_stamp_reads_back_and_a_lost_null_is_told(cache: Path, tmp_path: Path):
    stamp = Stamp.read(cache)
    stamp.write(tmp_path)
    assert Stamp.read(tmp_path) == stamp
    assert json.loads((tmp_path / "cache.json").read_text())["format"] == 1
    assert read_null(cache, stamp.text)["text_mask"].tolist() == [True, False, False, False]
    with pytest.raises(UserError, match="the encoding of the empty caption cannot be read"):
        read_null(tmp_path, stamp.text)
