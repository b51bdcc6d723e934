"""Folders and tables of pictures, as people have them."""

import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture

from ldm.data.inputs import Source, open_source
from ldm.data.shards import BadSample
from ldm.errors import UserError


def read(source: Source) -> list[tuple[str, str | bytes | None]]:
    """What each item is called, with its caption or the reason it is unusable."""
    out = []
    for name, load in source.items():
        try:
            raw = load()
            assert raw.image.startswith(b"\xff\xd8")
            out.append((name, raw.caption))
        except BadSample as bad:
            out.append((name, bad.reason))
    return out


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "p").mkdir()
    for i in range(3):
        (tmp_path / "p" / f"{i}.jpg").write_bytes(picture(i))
    return tmp_path


WANTED = [("p/0.jpg", b"one, two"), ("p/1.jpg", "h\u00e9".encode()), ("p/9.jpg", "image/missing")]


def test_tables_of_paths(pictures: Path):
    (pictures / "a.csv").write_text('\ufefffile_name,Text,n\np/0.jpg,"one, two",1\np/1.jpg,hé,2\np/9.jpg,x,3\n')
    (pictures / "a.tsv").write_text("filepath\tcaption\np/0.jpg\tone, two\np/1.jpg\thé\np/9.jpg\tx\n")
    rows = [
        {"image": "p/0.jpg", "TEXT": "one, two"},
        {"image": "p/1.jpg", "TEXT": "hé"},
        {"image": "p/9.jpg", "TEXT": "x"},
    ]
    (pictures / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pq.write_table(pa.Table.from_pylist(rows), pictures / "a.parquet")
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        assert read(open_source(pictures / f"a.{kind}")) == WANTED, kind
    assert [load().metadata for _, load in open_source(pictures / "a.csv").part(0, 1).items()] == [{"n": "1"}]


def test_rows_that_cannot_be_used(pictures: Path):
    lines = [b'{"image": "p/0.jpg"}', b"no json", b"[]", b'{"image": "p/0.jpg", "caption": ["a"]}', b'{"caption": "x"}']
    lines += [b'{"image": "https://example.org/a.jpg", "caption": "x"}', b'{"image": "p", "caption": "x"}']
    lines += [b'{"image": "p/\\u0000", "caption": "x"}', b'{"image": "p/1.jpg", "caption": "\\ud800"}']
    (pictures / "a.jsonl").write_bytes(b"\n".join(lines))
    assert read(open_source(pictures / "a.jsonl")) == [
        ("p/0.jpg", None),
        ("row 2", "json/unreadable"),
        ("row 3", "json/not an object"),
        ("p/0.jpg", "caption/not text"),
        ("row 5", "image/missing"),
        ("https://example.org/a.jpg", "image/a URL, not a file"),
        ("p", "image/missing"),
        ("p/\0", "image/cannot be opened"),
        ("p/1.jpg", b"\xed\xa0\x80"),  # no UTF-8: dropped by the reader's rules
    ]
    (pictures / "a.csv").write_text("image,caption\np/0.jpg\np/1.jpg,a,b\np/2.jpg,x\n")
    assert [caption for _, caption in read(open_source(pictures / "a.csv"))] == ["table/wrong columns"] * 2 + [b"x"]


def test_parquet_that_holds_the_pictures(tmp_path: Path):
    rows = [
        {"image": {"bytes": picture(i), "path": f"{i}.jpg"}, "text": f"{i}", "day": date(2026, 1, 1), "raw": b"x"}
        for i in range(7)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    source = open_source(tmp_path / "a.parquet")
    whole = read(source)
    assert whole == [(f"{i}.jpg", f"{i}".encode()) for i in range(7)]
    assert len(source) == 7
    parts = [source.part(start, start + 2) for start in range(0, 7, 2)]
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert [item for part in parts for item in read(part)] == whole
    assert read(source.part(2, 6).part(1, 9)) == whole[3:6]
    (_, load), *_ = source.items()
    assert load().metadata == {"day": date(2026, 1, 1)}  # bytes have no place in a .json
    bare = [{"jpg": row["image"]["bytes"], "text": row["text"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(bare), tmp_path / "b.parquet")
    assert read(open_source(tmp_path / "b.parquet", image_column="jpg"))[2] == ("row 3", b"2")


def test_a_folder_is_read_in_one_order_whatever_lies_there(tmp_path: Path):
    for name in ("b/1.jpg", "a/2.jpg", "a.b.jpg", ".hidden/3.jpg", ".4.jpg", "link.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(0))
    (tmp_path / "a.b.txt").write_text("dots")
    (tmp_path / "b" / "1.json").write_text("[]")
    (tmp_path / "link.jpg").unlink()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone")
    source = open_source(tmp_path)
    assert read(source) == [
        ("a.b.jpg", b"dots"),
        ("a/2.jpg", None),
        ("b/1.jpg", "json/not an object"),
        ("link.jpg", "image/missing"),
    ]
    assert read(source.part(1, 3)) == read(source)[1:3]
    assert open_source(tmp_path).digest == source.digest
    (tmp_path / "a.b.txt").write_text("other")
    assert open_source(tmp_path).digest != source.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", "x", r"a\.xlsx is not a folder or a table; expected one of \.csv"),
        ("a.csv", "image,caption\n", "holds no pictures"),
        ("a.csv", "", "none of the columns image, .* choose with --image-column from"),
        ("a.csv", "image,label\nx,y\n", "none of the columns caption, .* --caption-column from: image, label"),
        ("a.csv", 'image,caption\na.jpg,"b" c\n', "after line 1: .* mend the quotes"),
        ("a.parquet", "no parquet", "cannot be read as a Parquet table"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / name)


def test_columns_that_are_not_there(tmp_path: Path):
    (tmp_path / "a.csv").write_text("image,caption\nx,y\n")
    with pytest.raises(UserError, match=r"no column 'CAP'; choose with --caption-column from: image, caption"):
        open_source(tmp_path / "a.csv", caption_column="CAP")
    (tmp_path / "a.csv").unlink()
    with pytest.raises(UserError, match="holds no pictures"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="are for tables"):
        open_source(tmp_path, image_column="image")
    with pytest.raises(UserError, match="there is no"):
        open_source(tmp_path / "nothing")
