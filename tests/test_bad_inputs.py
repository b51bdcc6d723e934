"""Every bad input of a shard, among sound samples, through the whole reader: a drop by name with shard and key, and the sound
samples all the same. Delivered + dropped is what the manifest promises.
"""

import gzip
import io
import json
import lzma
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, sample, write_tar
from PIL import Image
from test_transforms import bomb, encode

from ldm.batch import Batch
from ldm.data.decode import DecodeSample
from ldm.data.sources import ShardCache, expand
from ldm.data.stream import OrderedSamples

SOUND = 6  # samples of the sound shard, and of the bad one beside what is bad in it


class Gadget:
    def __reduce__(self) -> tuple:
        return (Path("executed").touch, ())


def read_all(folder: Path) -> tuple[list[str], Counter[str], dict[str, str], list[Batch]]:
    """Keys, drops and their places: 00000.tar (sound), then 00001.tar (bad)."""
    samples = OrderedSamples(expand(f"{folder}/{{00000..00001}}.tar"), DecodeSample(16), ShardCache("unused", 1))
    keys, dropped, where = [], Counter(), {}
    seen = [samples[i] for i in range(len(samples))]
    for batch in seen:
        keys += batch["key"]
        dropped.update(batch["dropped"])
        where |= batch["dropped_where"]
    return keys, dropped, where, [batch for batch in seen if batch["key"]]


def member(number: int, ending: str, data: bytes) -> list[tuple[str, bytes]]:
    """Sample `number` with the member of this ending replaced, or added."""
    kept = [(name, old) for name, old in sample(number) if not name.endswith(f".{ending}")]
    return [*kept, (f"{number:09d}.{ending}", data)]


def without(number: int, ending: str) -> list[tuple[str, bytes]]:
    return [(name, data) for name, data in sample(number) if not name.endswith(f".{ending}")]


def gradient(mode: str, side: int = 32) -> Image.Image:
    return Image.fromarray(np.arange(side * side).reshape(side, side).astype(np.uint8)).convert(mode)


def animated() -> bytes:
    file = io.BytesIO()
    gradient("RGB").save(file, "WEBP", save_all=True, append_images=[gradient("RGB").rotate(90)])
    return file.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file\n%%EOF"
OBJECTS = io.BytesIO()
np.save(OBJECTS, np.array([Gadget()], dtype=object), allow_pickle=True)

# what one sample is -> the reason it is dropped for, or None where it is usable
SAMPLES: dict[str, tuple[list[tuple[str, bytes]], str | None]] = {
    "image of 0 bytes": (member(50, "jpg", b""), "image/empty"),
    "image truncated": (member(50, "jpg", picture(50, 300, 300)[:-900]), "image/truncated"),
    "wrong magic": (member(50, "jpg", b"GIF89a" + b"\0" * 99), "image/not an image"),
    "HTML as an image": (member(50, "jpg", b"<html>404</html>"), "image/not an image"),
    "SVG": (member(50, "jpg", SVG), "image/not an image"),
    "EPS": (member(50, "jpg", EPS), "image/not an image"),
    "bomb": (member(50, "jpg", bomb(60_000, 60_000)), "image/too large"),
    "1 x 20000": (member(50, "jpg", encode(Image.new("RGB", (1, 20_000)))), "image/too narrow"),
    "1 x 1": (member(50, "jpg", encode(Image.new("RGB", (1, 1)))), None),
    "constant": (member(50, "jpg", encode(Image.new("RGB", (32, 32), "red"))), None),
    "CMYK": (member(50, "jpg", encode(gradient("CMYK"), "JPEG")), None),
    "palette with transparency": (member(50, "jpg", encode(gradient("P"), transparency=3)), None),
    "gray with alpha": (member(50, "jpg", encode(gradient("LA"))), None),
    "16 bit": (member(50, "jpg", encode(Image.fromarray(np.full((20, 20), 40_000, np.uint16)))), None),
    "animated": (member(50, "jpg", animated()), None),
    "upper-case extension": ([(name.replace("jpg", "JPG"), data) for name, data in sample(50)], None),
    "no image": (without(50, "jpg"), "image/missing"),
    "no caption": (without(50, "txt"), "caption/missing"),
    "empty caption": (member(50, "txt", b" \r\n\t"), "caption/empty"),
    "caption of invalid UTF-8": (member(50, "txt", b"caf\xe9"), "caption/not UTF-8"),
    "caption of 1 MB": (member(50, "txt", b"a" * 2**20), "caption/too long"),
    "caption of control characters": (member(50, "txt", b"a\x00b\x1b[31mc"), None),
    "caption of emoji": (member(50, "txt", "😀🙈".encode()), None),
    "caption past 77 tokens": (member(50, "txt", b"cat " * 500), None),
    "bad json": (member(50, "json", b'{"caption":'), "json/unreadable"),
    "deep json": (member(50, "json", b"[" * 100_000), "json/unreadable"),
    "a list as json": (member(50, "json", b"[1, 2]"), "json/not an object"),
    "NaN in json": (member(50, "json", b'{"similarity": NaN, "width": "wide"}'), None),
    "_target_ in json": (member(50, "json", b'{"_target_": "os.system", "command": "touch executed"}'), None),
    "no json": (without(50, "json"), None),
    "a pickle beside": (member(50, "pkl", pickle.dumps(Gadget())), None),
    "a pickle as .pyd": (member(50, "pyd", pickle.dumps(Gadget())), None),
    "an object array": (member(50, "npy", OBJECTS.getvalue()), None),
    "duplicate members": ([*sample(50), sample(50)[0]], "sample/duplicate member"),
    "name with ../": ([(f"../../{name}", data) for name, data in sample(50)], None),
    "absolute name": ([(f"/abs/{name}", data) for name, data in sample(50)], None),
    "name of 300 characters": ([("n" * 300 + name, data) for name, data in sample(50)], None),
    "name of emoji": ([("😀" + name, data) for name, data in sample(50)], None),
}


def write(folder: Path, bad: list[tuple[str, bytes]], promised: int | None) -> None:
    write_tar(folder / "00000.tar", [m for i in range(SOUND) for m in sample(i)])
    middle = [m for i in range(10, 10 + SOUND // 2) for m in sample(i)]
    end = [m for i in range(20, 20 + SOUND // 2) for m in sample(i)]
    write_tar(folder / "00001.tar", [*middle, *bad, *end])
    (folder / "00000_stats.json").write_text(json.dumps({"successes": SOUND}))
    if promised is not None:
        (folder / "00001_stats.json").write_text(json.dumps({"successes": promised}))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_bad_sample_costs_one_sample(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members, reason = SAMPLES[name]
    write(tmp_path, members, SOUND + 1)
    keys, dropped, where, seen = read_all(tmp_path)
    assert len(keys) + sum(dropped.values()) == 2 * SOUND + 1
    assert len(set(keys)) == len(keys) == 2 * SOUND + (reason is None)
    assert dropped == ({} if reason is None else {reason: 1})
    if reason is not None:
        assert where[reason].startswith(f"{tmp_path}/00001.tar: ")
    assert all(batch["image"].shape == (1, 3, 16, 16) for batch in seen)
    assert not Path("executed").exists()


def cut(data: bytes, name: str, offset: int = 0) -> bytes:
    return data[: data.index(name.encode()) + offset]


def flip(data: bytes) -> bytes:
    place = data.index(b"000000020.json") + 130
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def split(data: bytes) -> bytes:
    """Members of two samples that do not stand together."""
    file = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=file, mode="w") as new:
        every = old.getmembers()
        moved = [m for m in every if m.name in ("000000020.txt", "000000021.txt")]
        for m in [*(m for m in every if m not in moved), *moved]:
            new.addfile(m, old.extractfile(m))
    return file.getvalue()


def dotted(data: bytes) -> bytes:
    """Dots in base names: two samples of one key, as webdataset reads them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=file, mode="w") as new:
        for m in old.getmembers():
            if m.name.startswith(("000000020", "000000021")):
                m.name = "a." + m.name
            new.addfile(m, old.extractfile(old.getmembers()[len(new.getmembers())]))
    return file.getvalue()


# what is done to the shard of 6 -> samples delivered, and the reasons of the others
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int, set[str]]] = {
    "cut at a sample's boundary": (lambda d: cut(d, "000000021.jpg"), 3, {"shard/truncated"}),
    "cut there, with an end mark": (
        lambda d: cut(d, "000000021.jpg") + b"\0" * 1024, 4, {"shard/fewer samples than its manifest"}
    ),
    "cut inside a header": (lambda d: cut(d, "000000021.jpg", 100), 3, {"shard/truncated"}),
    "cut between members": (lambda d: cut(d, "000000020.txt"), 3, {"shard/truncated"}),
    "cut in the data": (lambda d: cut(d, "000000020.txt", 515), 3, {"shard/truncated"}),
    "a flipped bit": (flip, 3, {"shard/bad header", "shard/unreadable"}),
    "two tars joined": (lambda d: d + d, 5, {"shard/data after the end"}),
    "empty file": (lambda d: b"", 0, {"shard/unreadable"}),
    "HTML": (lambda d: b"<!doctype html><html>" + b" " * 2000, 0, {"shard/unreadable"}),
    "XML": (lambda d: b"<?xml version='1.0'?><Error>AccessDenied</Error>", 0, {"shard/unreadable"}),
    "no members": (lambda d: b"\0" * 10240, 0, {"shard/empty"}),
    "gzip": (gzip.compress, 0, {"shard/unreadable"}),
    "xz": (lzma.compress, 0, {"shard/unreadable"}),
    "members that do not stand together": (split, 4, {"sample/split members"}),
    "dots in base names": (dotted, 4, {"caption/missing", "shard/fewer samples than its manifest"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_counted_against_the_manifest(name: str, tmp_path: Path) -> None:
    damage, delivered, reasons = DAMAGE[name]
    write(tmp_path, [], SOUND)
    shard = tmp_path / "00001.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    keys, dropped, where, _ = read_all(tmp_path)
    assert len(keys) == len(set(keys)) == SOUND + delivered
    assert sum(dropped.values()) == SOUND - delivered
    assert set(dropped) <= reasons
    assert all(place.startswith(str(shard)) for place in where.values())


def test_a_shard_a_hundred_times_larger(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [m for i in range(3) for m in sample(i)])
    write_tar(tmp_path / "00001.tar", [m for i in range(10, 310) for m in sample(i)])
    keys, dropped, _, _ = read_all(tmp_path)
    assert not dropped
    assert len(keys) == 303
