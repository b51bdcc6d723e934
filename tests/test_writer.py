"""Shards as img2dataset writes them: complete or invisible, the same bytes for the same samples, read by our stream."""

import contextlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from ldm.data.decode import DecodeSample
from ldm.data.sources import ShardCache
from ldm.data.stream import OrderedSamples
from ldm.data.writer import ShardWriter
from ldm.errors import UserError


def _png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(file, "PNG")
    return file.getvalue()


def _write(folder: Path, count: int = 5) -> list[str]:
    with ShardWriter(folder, shard_size=2) as writer:
        return [writer.write(_png("red"), "png", f"caption {i} é", {"source": "here"}) for i in range(count)]


def test_members_keys_and_side_files(tmp_path: Path):
    assert _write(tmp_path) == ["000000000", "000000001", "000010000", "000010001", "000020000"]
    with tarfile.open(tmp_path / "00001.tar") as tar:
        names = tar.getnames()
        row = json.load(tar.extractfile("000010001.json"))
        assert tar.extractfile("000010001.txt").read().decode() == "caption 3 é"
    assert names == [f"{key}.{ext}" for key in ("000010000", "000010001") for ext in ("json", "png", "txt")]
    assert (row["caption"], row["width"], row["height"], row["source"]) == ("caption 3 é", 20, 16, "here")
    assert pq.read_table(tmp_path / "00001.parquet").to_pylist()[1]["key"] == "000010001"
    assert json.loads((tmp_path / "00002_stats.json").read_text())["successes"] == 1


def test_same_samples_same_bytes(tmp_path: Path):
    _write(tmp_path / "a")
    _write(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_an_interrupted_shard_is_invisible(tmp_path: Path):
    with contextlib.suppress(KeyboardInterrupt), ShardWriter(tmp_path, shard_size=2) as writer:
        for _ in range(3):
            writer.write(_png("red"), "png", "x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.glob("*.tar")] == ["00000.tar"]
    assert not list(tmp_path.glob("*.partial"))


def test_our_reader_and_webdataset_read_the_same(tmp_path: Path):
    _write(tmp_path)
    paths = sorted(str(p) for p in tmp_path.glob("*.tar"))
    (batch,) = OrderedSamples(paths, DecodeSample(16), ShardCache("unused", 1)).batches(8)
    assert batch["caption"] == [f"caption {i} é" for i in range(5)]
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == batch["key"]
    assert [sample["txt"].decode() for sample in theirs] == batch["caption"]
    assert all(sample["png"] == _png("red") for sample in theirs)


def test_a_key_has_room_for_four_digits(tmp_path: Path):
    with pytest.raises(UserError, match="shard_size is 10000"):
        ShardWriter(tmp_path, 10_000)


def test_only_pictures_are_written(tmp_path: Path):
    with pytest.raises(UserError, match="extension is 'txt'"), ShardWriter(tmp_path) as writer:
        writer.write(_png("red"), "txt", "x")
    with pytest.raises(UserError, match="4 bytes that are no picture"), ShardWriter(tmp_path) as writer:
        writer.write(b"junk", "png", "x")
    assert not list(tmp_path.iterdir())
