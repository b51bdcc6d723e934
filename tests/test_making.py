"""Shards made from pictures: exact counts, the same bytes for any number of workers, whole after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import picture
from PIL import Image
from rich.console import Console
from tiny import ROOT

from ldm.data import audit, making
from ldm.data.inputs import open_source
from ldm.errors import UserError


def folder(path: Path, count: int) -> Path:
    """Sound pictures with captions, one folder down, and one of each kind of bad item among them."""
    (path / "sub").mkdir(parents=True)
    for i in range(count):
        (path / "sub" / f"{i:04d}.jpg").write_bytes(picture(i))
        (path / "sub" / f"{i:04d}.txt").write_text(f"picture {i}")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {name: file.extractfile(name).read() for name in file.getnames()}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """8 items of which 4 are sound: JPEG by .txt, PNG by .json, WebP, a phone's turned JPEG."""
    path = tmp_path / "pictures"
    path.mkdir()
    (path / "a.jpg").write_bytes(picture(0))
    (path / "a.txt").write_bytes(b"\xef\xbb\xbffrom the txt\r\n")
    (path / "a.json").write_text(
        json.dumps({"caption": "not this one", "TEXT": "x", "width": 4000, "score": float("nan")})
    )
    (path / "b.PNG").write_bytes(picture(1, format="PNG"))
    (path / "b.json").write_text(json.dumps({"TEXT": "from the json", "original_width": 999, "tags": ["x"]}))
    (path / "c.webp").write_bytes(picture(2, format="WEBP"))
    (path / "c.txt").write_text("webp")
    turned = Image.new("RGB", (30, 20))
    turned.getexif()[0x0112] = 6
    turned.save(path / "d.jpeg", exif=turned.getexif())
    (path / "d.txt").write_text("turned")
    (path / "e.jpg").write_bytes(picture(3)[:-20])
    (path / "e.txt").write_text("cut")
    (path / "f.jpg").write_bytes(picture(4))
    (path / "g.gif").write_bytes(b"GIF89a")
    (path / "g.txt").write_text("a format that is not allowed")
    (path / "h.jpg").write_bytes(picture(5))
    (path / "h.txt").write_text(" \n")
    (path / "._a.jpg").write_bytes(b"of the Finder")
    return path


def test_what_goes_in_and_what_is_dropped(mixed: Path, tmp_path: Path):
    made = making.make(open_source(mixed), tmp_path / "out", workers=1)
    assert (made.items, made.written, made.dropped.total()) == (8, 4, 4)
    assert made.examples == {
        "image/truncated": ["e.jpg"],
        "caption/missing": ["f.jpg"],
        "image/not an image": ["g.gif"],
        "caption/empty": ["h.jpg"],
    }
    assert json.loads((tmp_path / "out" / "make_report.json").read_text())["dropped"] == dict(made.dropped)
    got = members(tmp_path / "out" / "00000.tar")
    assert [name for name in got if not name.endswith(("txt", "json"))] == [
        "000000000.jpg",
        "000000001.png",
        "000000002.png",
        "000000003.jpg",
    ]
    assert (got["000000000.jpg"], got["000000001.png"]) == (
        (mixed / "a.jpg").read_bytes(),
        (mixed / "b.PNG").read_bytes(),
    )
    assert Image.open(io.BytesIO(got["000000002.png"])).format == "PNG"
    captions = [data for name, data in got.items() if name.endswith("txt")]
    assert captions == [b"from the txt", b"from the json", b"webp", b"turned"]


def test_metadata_travels_and_does_not_overrule_what_is_known(mixed: Path, tmp_path: Path):
    making.make(open_source(mixed), tmp_path / "out", workers=1)
    got = members(tmp_path / "out" / "00000.tar")
    a, b, _, d = (json.loads(data) for name, data in got.items() if name.endswith("json"))
    assert (a["caption"], a["width"], a["original_width"], a["score"]) == ("from the txt", 20, 20, None)
    assert (b["TEXT"], b["original_width"], b["tags"], b["source_path"]) == ("from the json", 999, ["x"], "b.PNG")
    assert (d["width"], d["height"]) == (20, 30)  # as it is seen
    rows = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["success"] * 4 + ["failed"] * 4
    assert rows[1]["tags"] == '["x"]'
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]["caption/empty"]) == (8, 4, 1)


def test_what_is_made_passes_the_audit(mixed: Path, tmp_path: Path):
    making.make(open_source(mixed), tmp_path / "out", shard_size=2, workers=1)
    found = audit.audit([str(path) for path in sorted((tmp_path / "out").glob("*.tar"))], workers=1)
    assert (found.clean, found.items, found.promised) == (True, 4, 4)


def test_columns_of_all_rows_and_of_mixed_kinds(tmp_path: Path):
    path = folder(tmp_path / "in", 3)
    for i, extra in enumerate(({"a": 1}, {"a": "x", "b": {}}, {"a": 2**70})):
        (path / "sub" / f"{i:04d}.json").write_text(json.dumps(extra))
    making.make(open_source(path), tmp_path / "out", workers=1)
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert table["a"].to_pylist() == ["1", '"x"', str(2**70)]
    assert table["b"].to_pylist() == [None, "{}", None]


def test_a_shard_of_dropped_items_only_is_not_there(tmp_path: Path):
    path = folder(tmp_path / "in", 7)
    for i in (2, 3):
        (path / "sub" / f"{i:04d}.txt").unlink()
    for _ in range(2):  # again from the side files
        made = making.make(open_source(path), tmp_path / "out", shard_size=2, workers=1)
        assert (made.written, dict(made.dropped), made.shards) == (
            5,
            {"caption/missing": 2},
            ["00000", "00002", "00003"],
        )
    file = io.StringIO()
    making.show(made, tmp_path / "out", Console(file=file, width=200))
    shards = file.getvalue().split("data.shards=")[1].strip()
    assert [Path(each).stem for each in audit.local_shards(shards)] == made.shards
    assert "caption/missing" in file.getvalue()
    assert "sub/0002.jpg" in file.getvalue()


def test_any_number_of_workers_writes_the_same_bytes(mixed: Path, tmp_path: Path):
    for workers in (1, 2):
        made = making.make(open_source(mixed), tmp_path / f"{workers}", shard_size=3, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert made.items == 8


KILLED = """
import os, sys
from ldm.data import making
from ldm.data.inputs import open_source
inner = making.ShardWriter.write
def slow(self, *args):
    if self.shard >= 2 and len(self.rows) == 1:
        open(sys.argv[3], "w").close()
        import threading; threading.Event().wait(60)
    return inner(self, *args)
making.ShardWriter.write = slow
making.make(open_source(sys.argv[1]), sys.argv[2], shard_size=3, workers=2)
"""


def test_a_kill_and_the_same_command_give_the_same_bytes(tmp_path: Path):
    path, out, flag = folder(tmp_path / "in", 14), tmp_path / "out", tmp_path / "flag"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(out), str(flag)], cwd=ROOT)
    while not flag.exists() or len(list(out.glob("*.tar"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match="another process writes"):
        making.make(open_source(path), out, shard_size=3, workers=1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sorted(each.name for each in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    made = _when_the_workers_have_ended(path, out)
    making.make(open_source(path), tmp_path / "whole", shard_size=3, workers=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert made.written == 14


def _when_the_workers_have_ended(path: Path, out: Path) -> making.Made:
    end = time.monotonic() + 60
    while time.monotonic() < end:  # they hold the lock until they see that the parent is gone
        try:
            return making.make(open_source(path), out, shard_size=3, workers=1)
        except UserError:
            time.sleep(0.02)
    raise AssertionError("the workers live on")


def test_another_input_is_refused(tmp_path: Path):
    path, out = folder(tmp_path / "in", 4), tmp_path / "out"
    making.make(open_source(path), out, shard_size=2, workers=1)
    before = contents(out)
    with pytest.raises(UserError, match="made from another input"):
        making.make(open_source(path), out, shard_size=3, workers=1)
    (path / "sub" / "0001.txt").write_text("another caption")
    with pytest.raises(UserError, match="made from another input"):
        making.make(open_source(path), out, shard_size=2, workers=1)
    assert contents(out) == before


def test_foreign_shards_are_refused(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="did not make"):
        making.make(open_source(folder(tmp_path / "in", 2)), out, workers=1)
    assert [path.name for path in out.iterdir()] == ["00000.tar"]
