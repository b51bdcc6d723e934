"""Tiny shards in img2dataset's layout, made once a session."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _tracebacks_as_they_were() -> Iterator[None]:
    """An entry point that ran in this process leaves Hydra's switch on, and later processes would show tracebacks."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    yield
    if before is None:
        os.environ.pop("HYDRA_FULL_ERROR", None)


Members = Iterable[tuple[str, bytes]]


def picture(number: int, width: int = 20, height: int = 16, format: str = "JPEG") -> bytes:  # noqa: A002
    """An encoded picture with a color and a gradient of its own."""
    image = Image.new("RGB", (width, height), ((number * 37) % 256, (number * 91) % 256, (number * 53) % 256))
    image.paste((255, 255, 255), (0, 0, width // 2, height // 2))
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def sample(number: int) -> list[tuple[str, bytes]]:
    """The members of one sound sample: `000000012.jpg`, `.json`, `.txt`."""
    jpg = picture(number, width=16 + number % 17, height=16 + number % 13)
    meta = json.dumps({"key": f"{number:09d}", "caption": f"picture {number}"}).encode()
    return [
        (f"{number:09d}.jpg", jpg),
        (f"{number:09d}.json", meta),
        (f"{number:09d}.txt", f"picture {number}".encode()),
    ]


def write_tar(path: Path, members: Members) -> Path:
    """A tar with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: Iterable[int]) -> str:
    """00000.tar, ... with so many samples each, and their side files -> the brace range that names them."""
    sizes = list(sizes)
    number = 0
    for shard, size in enumerate(sizes):
        members = [member for i in range(number, number + size) for member in sample(i)]
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": size, "successes": size}))
        number += size
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """8 shards of 10 to 14 captioned pictures of 16 to 32 px: 96 samples."""
    return write_shards(tmp_path_factory.mktemp("tiny_shards"), [12, 10, 14, 12, 11, 13, 12, 12])


@pytest.fixture(scope="session")
def tiny_val(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2 shards of 12 and 9 samples."""
    return write_shards(tmp_path_factory.mktemp("tiny_val"), [12, 9])
