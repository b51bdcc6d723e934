"""Tars as they come: sound, damaged, hostile."""

import io
import random
import tarfile
from pathlib import Path

import pytest
from conftest import sample, write_tar

from ldm.data import shards
from ldm.data.shards import BadSample, Entry, entries, read


def walk(path: Path) -> list[str]:
    """Keys, and the reasons of what is unusable."""
    with open(path, "rb") as file:
        return [item.key if isinstance(item, Entry) else item.reason for item in entries(file)]


def members(*numbers: int) -> list[tuple[str, bytes]]:
    return [member for number in numbers for member in sample(number)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", members(0, 1, 2))


KEYS = ["000000000", "000000001", "000000002"]


def test_samples_come_in_order_with_their_bytes(three: Path) -> None:
    assert walk(three) == KEYS
    with open(three, "rb") as file:
        assert [list(read(file, entry).items()) for entry in entries(file)] == [
            [(name.partition(".")[2], data) for name, data in sample(number)] for number in range(3)
        ]


def test_names(tmp_path: Path) -> None:
    odd = [("./d.d/a.JPG", b"1"), ("./d.d/a.seg.png", b"2"), ("../../x.txt", b"3"), ("/abs.pyd", b"4"), ("noext", b"5")]
    odd += [("😀" * 100 + ".txt", b"6"), (".hidden", b"7")]
    with open(write_tar(tmp_path / "a.tar", odd), "rb") as file:
        got = [(entry.key, read(file, entry)) for entry in entries(file)]
    assert got == [
        ("./d.d/a", {"jpg": b"1", "seg.png": b"2"}),
        ("../../x", {"txt": b"3"}),
        ("/abs", {"pyd": b"4"}),
        ("😀" * 100, {"txt": b"6"}),
    ]


def test_a_name_that_is_no_utf8_becomes_printable(three: Path) -> None:
    data = three.read_bytes()
    for _ in range(3):
        header = data.index(b"000000001.")
        block = bytearray(data[header : header + 512])
        block[:1] = b"\xff"
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data = data[:header] + block + data[header + 512 :]
    three.write_bytes(data)
    assert walk(three) == [KEYS[0], "?00000001", KEYS[2]]


def test_duplicates_and_links(tmp_path: Path) -> None:
    assert walk(write_tar(tmp_path / "a.tar", [*sample(0), *sample(0), *sample(1)])) == [
        "sample/duplicate member",
        KEYS[1],
    ]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            header = tarfile.TarInfo(f"{kind!r}.txt")
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    assert walk(tmp_path / "b.tar") == ["shard/empty"]


def test_damage_is_never_silent(three: Path) -> None:
    """Every cut and every flipped header bit ends the shard with a named item; before it, only sound samples."""
    sound = three.read_bytes()
    end = sound.rindex(b"picture 2") + 512
    end -= end % 512  # the end-of-archive mark
    for cut in range(1, end + 1, 97):
        three.write_bytes(sound[:cut])
        *keys, last = walk(three)
        assert last.startswith("shard/")
        assert keys == KEYS[: len(keys)]
    with open(three, "wb") as file:
        file.write(sound)
    with open(three, "rb") as file:
        second = [entry for entry in entries(file) if isinstance(entry, Entry)][1].members["jpg"][0] - 512
    for byte in range(0, 512, 7):
        three.write_bytes(sound[: second + byte] + bytes([sound[second + byte] ^ 4]) + sound[second + byte + 1 :])
        *keys, last = walk(three)
        assert last.startswith("shard/"), byte
        assert keys == []  # the damage touches the first sample's end


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "shard/unreadable"),
        (b"<html><body>404</body></html>" * 100, "shard/unreadable"),
        (b"\x1f\x8b" + bytes(1000), "shard/unreadable"),
        (bytes(10240), "shard/empty"),
        (bytes(100), "shard/unreadable"),
    ],
)
def test_what_is_no_tar(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert walk(tmp_path / "a.tar") == [reason]


def test_two_tars_joined(three: Path) -> None:
    three.write_bytes(three.read_bytes() * 2)
    assert walk(three) == [*KEYS[:2], "shard/data after the end"]


def test_sizes_that_lie(tmp_path: Path) -> None:
    for size in (-512, 2**60, 2**33):
        header = tarfile.TarInfo("a.jpg")
        header.size = size
        (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        assert walk(tmp_path / "a.tar")[0].startswith("shard/")


def test_a_member_that_points_back_is_no_circle(three: Path) -> None:
    """A sparse member keeps its negative size from tarfile's callers, but tarfile goes back by it (CVE-2025-8194)."""
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, -512
    end = three.read_bytes().rindex(b"picture 2") // 512 * 512 + 512
    three.write_bytes(three.read_bytes()[:end] + header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert walk(three) == [*KEYS[:2], "shard/bad header"]


def test_bytes_at_random_end(three: Path) -> None:
    """No byte pattern raises, hangs or reads past the file."""
    draw = random.Random(0)
    sound = three.read_bytes()[:9000]
    for _ in range(200):
        data = bytearray(sound)
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        three.write_bytes(data)
        with open(three, "rb") as file:
            for item in entries(file):
                if isinstance(item, Entry):
                    read(file, item)


def test_a_shard_that_shrinks_while_read(three: Path) -> None:
    with open(three, "rb") as file:
        found = [entry for entry in entries(file) if isinstance(entry, Entry)]
        three.write_bytes(three.read_bytes()[:1000])
        with pytest.raises(BadSample, match="shard/truncated"):
            read(file, found[2])


def test_a_sample_over_the_limit_is_not_read() -> None:
    with pytest.raises(BadSample, match="sample/too large"):
        read(io.BytesIO(), Entry("a", {"jpg": (0, 2**28)}))


def test_the_short_way_through_a_header_finds_what_tarfile_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over damage of every kind that a checksum does not hide."""
    rng, path = random.Random(0), tmp_path / "0.tar"
    names = ["00012.jpg", "a/b.txt", "x" * 60 + "/" + "y" * 50 + ".json", "é.txt", "0 .jpg", "d/", "7.txt "]
    plain, ways = shards._plain_file, []
    for _ in range(300):
        with tarfile.open(path, "w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
            for name in rng.sample(names, rng.randint(1, 7)):
                header = tarfile.TarInfo(name)
                header.size = rng.choice([0, 1, 511, 512, 513])
                header.type = rng.choice([tarfile.REGTYPE] * 9 + [tarfile.SYMTYPE, tarfile.AREGTYPE])
                tar.addfile(header, io.BytesIO(b"7" * header.size) if header.isreg() else None)
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(0, 2)):
            at = 512 * rng.randrange(len(data) // 512) + rng.choice(
                [rng.randrange(512), rng.randrange(124, 157), 0, 345]
            )
            data[at] = rng.choice([0, 32, 43, 45, 48, 55, 56, 95, 128, 255])
        path.write_bytes(data[: rng.choice([len(data)] * 9 + [rng.randrange(len(data))])])
        ways = []
        for way in (plain, lambda block: None):
            monkeypatch.setattr(shards, "_plain_file", way)
            with path.open("rb") as file:
                ways.append([item if isinstance(item, Entry) else item.reason for item in entries(file)])
        assert ways[0] == ways[1]
    monkeypatch.setattr(shards, "_plain_file", plain)
    assert plain(data[:512]) is None or plain(data[:512])[1] <= 513
