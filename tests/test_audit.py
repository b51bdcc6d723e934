"""The audit counts what training would drop, finds damage, and vouches for no damaged shard."""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import picture, sample, write_shards, write_tar
from rich.console import Console
from tiny import ROOT

from ldm.data import audit
from ldm.data.decode import DecodeSample
from ldm.data.filters import NotListed
from ldm.data.sources import expand
from ldm.errors import UserError

CLIPART = ROOT.parent / "shared" / "data" / "clipart"


def members(*numbers: int) -> list[tuple[str, bytes]]:
    return [member for number in numbers for member in sample(number)]


def shown(found: audit.Audit) -> str:
    file = io.StringIO()
    audit.show(audit.summary(found), Console(file=file, width=160))
    return file.getvalue()


def check(path: Path, decode: bool = True) -> audit.Audit:
    return audit.audit([str(path)], decode, workers=1)


def test_sound_shards(tiny_shards: str):
    paths = audit.local_shards(tiny_shards)
    found = audit.audit(paths, workers=1)
    assert (found.clean, found.items, len(found.samples), found.promised) == (True, 96, 96, 96)
    assert found.extensions == {"jpg": 96, "json": 96, "txt": 96}
    said = audit.summary(found)
    assert (said["width"]["min"], said["width"]["max"], said["under"]) == (16, 32, {"256": 96, "512": 96})
    assert said["fields"] == {"key": 1, "caption": 1}
    assert said["words"] == {"min": 2, "median": 2, "max": 2}
    json.dumps(said, allow_nan=False)
    assert audit.summary(audit.audit(paths, workers=2)) == said
    assert "all 96 usable" in shown(found)


def test_bad_samples_are_counted_by_the_readers_reasons(tmp_path: Path):
    bad = [("a.jpg", picture(0)), ("b.jpg", picture(0)), ("b.txt", b" "), ("c.txt", b"no picture")]
    bad += [("d.jpg", picture(1)[:-20]), ("d.txt", b"cut"), ("e.jpg", b"junk"), ("e.txt", b"junk")]
    bad += [("f.jpg", picture(2)), ("f.txt", b"f"), ("f.json", b"[]")]
    path = write_tar(tmp_path / "00000.tar", [*members(0), *bad])
    found = check(path)
    reasons = ["caption/missing", "caption/empty", "image/missing", "image/truncated", "image/not an image"]
    assert found.dropped == Counter([*reasons, "json/not an object"])
    assert [(each.where, each.reason) for each in found.damage][:2] == [
        ("a", "caption/missing"),
        ("b", "caption/empty"),
    ]
    assert (found.items, len(found.samples), found.without_manifest) == (7, 1, 1)
    assert "1 usable" in shown(found)
    assert "no manifest" in shown(found)
    headers = check(path, decode=False)
    assert headers.dropped == found.dropped - Counter(["image/truncated"])
    assert "by the pictures' headers" in shown(headers)


def damaged(kind: str, sound: bytes) -> bytes:
    second = sound.index(b"000000001.jpg")
    end = len(sound.rstrip(b"\0")) // 512 * 512 + 512  # the end-of-archive mark
    return {
        "cut in a sample": sound[: second + 2100],
        "cut between samples": sound[:second] + bytes(1024),
        "bit flip in a header": sound[: second + 150] + bytes([sound[second + 150] ^ 4]) + sound[second + 151 :],
        "joined": sound[:end] + bytes(1024) + sound,
        "empty": b"",
        "HTML": b"<html>not found</html>" * 100,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason", "usable", "where"),
    [
        ("cut in a sample", "shard/truncated", 1, "after 000000000"),
        ("cut between samples", "shard/fewer samples than its manifest", 1, "after 000000000"),
        ("bit flip in a header", "shard/bad header", 0, "after the beginning"),
        ("joined", "shard/data after the end", 2, "after 000000001"),
        ("empty", "shard/unreadable", 0, "after the beginning"),
        ("HTML", "shard/unreadable", 0, "after the beginning"),
    ],
)
def test_damaged_shards_are_found_and_get_no_index(tmp_path: Path, kind: str, reason: str, usable: int, where: str):
    write_shards(tmp_path, [3, 2])
    path, other = tmp_path / "00000.tar", tmp_path / "00001.tar"
    path.write_bytes(damaged(kind, path.read_bytes()))
    found = audit.audit([str(path), str(other)], workers=1)
    assert (len(found.samples), set(found.dropped), found.items) == (usable + 2, {reason}, 5)
    assert found.damage == [audit.Damage(str(path), where, reason)]
    assert audit.index([str(path), str(other)], workers=1) == found.damage
    assert sorted(each.name for each in tmp_path.glob("*.index.json*")) == ["00001.index.json"]
    assert reason in shown(found)


def test_half_samples(tmp_path: Path):
    (jpg, data, txt), other = sample(0), sample(1)
    path = write_tar(tmp_path / "00000.tar", [jpg, data, *other, txt])
    found = check(path)
    assert found.dropped == {"sample/split members": 1}
    assert [each.key for each in found.samples] == ["000000001"]
    assert [each.reason for each in audit.index([str(path)], workers=1)] == ["sample/split members"]


def test_an_index_tells_any_change(tmp_path: Path):
    write_shards(tmp_path, [3])
    path = tmp_path / "00000.tar"
    for _ in range(2):
        assert audit.index([str(path)], workers=1) == []
    said = json.loads((tmp_path / "00000.index.json").read_text())
    assert (said["count"], said["bytes"]) == (3, path.stat().st_size)
    assert check(path).clean
    path.write_bytes(path.read_bytes().replace(b"picture 2", b"picture 9"))
    found = check(path)
    assert (found.clean, found.altered, found.dropped) == (False, [str(path)], {})
    assert "is not what its index says" in shown(found)
    assert [each.reason for each in audit.index([str(path)], workers=1)] == ["shard/altered since it was indexed"]
    assert json.loads((tmp_path / "00000.index.json").read_text()) == said


def test_duplicates_can_be_excluded(tmp_path: Path):
    same = picture(5)
    rows = [(f"{key}.{ext}", data) for key in "abcd" for ext, data in (("jpg", same), ("txt", key.upper().encode()))]
    rows[4] = ("c.jpg", picture(6))
    rows[7] = ("d.txt", b"A")
    found = check(write_tar(tmp_path / "00000.tar", rows))
    said = audit.summary(found)
    assert (said["duplicate_pictures"], said["duplicate_captions"], said["duplicate_keys"]) == (2, 1, 0)
    assert audit.write_duplicates(found.samples, tmp_path / "list.txt") == 2
    assert (tmp_path / "list.txt").read_text() == "b\nd\n"
    keep = NotListed("key", str(tmp_path / "list.txt"), keep_missing=True)
    assert [each.key for each in found.samples if keep({"key": each.key})] == ["a", "c"]
    with pytest.raises(UserError, match="4 keys occur more than once"):
        audit.write_duplicates(found.samples * 2, tmp_path / "list.txt")


def test_scores_and_fields(tmp_path: Path):
    rows = [(0, {"AESTHETIC_SCORE": "5.5", "pwatermark": None}), (1, {"aesthetic": 6.5, "pwatermark": float("nan")})]
    data = [("jpg", picture(0)), ("txt", b"x")]
    tar = [(f"{i}.{ext}", each) for i, row in rows for ext, each in [*data, ("json", json.dumps(row).encode())]]
    said = audit.summary(check(write_tar(tmp_path / "00000.tar", tar)))
    assert said["scores"] == {"aesthetic": {"min": 5.5, "median": 6.0, "max": 6.5}}
    assert said["fields"] == {"AESTHETIC_SCORE": 0.5, "aesthetic": 0.5, "pwatermark": 0.5}


def test_nothing_usable(tmp_path: Path):
    found = check(write_tar(tmp_path / "00000.tar", [("a.jpg", b""), ("a.txt", b"a")]))
    assert audit.summary(found)["width"] is None
    assert "0 usable" in shown(found)


@pytest.mark.parametrize("spec", ["s3://bucket/{0..3}.tar", "http://example.org/a.tar?key=secret"])
def test_remote_shards_are_refused(spec: str):
    with pytest.raises(UserError, match="not a local path") as caught:
        audit.local_shards(spec)
    assert "secret" not in str(caught.value)


@pytest.mark.skipif(not CLIPART.is_dir(), reason="the clipart shards are not here")
def test_real_shards():
    paths = [str(path) for path in sorted(CLIPART.glob("*.tar"))[4:6]]
    found = audit.audit(expand(paths), workers=1)
    stats = [json.loads((CLIPART / f"0000{i}_stats.json").read_text()) for i in (4, 5)]
    assert found.items == found.promised == sum(each["successes"] for each in stats)
    assert found.dropped == {"image/too narrow": 1}
    assert DecodeSample(side=16).captions.weights == {"txt": 1.0}  # what the audit reads captions by
