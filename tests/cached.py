"""Shards that the tiny networks can read, and a latent cache of them."""

import json
from pathlib import Path
from typing import Any

from conftest import picture, write_tar
from tiny import SIDE, WordEncoder, captions, first_stage, randomized

from ldm.data.accounts import Tally
from ldm.data.sources import ShardCache, expand
from ldm.training.caching import CacheEncoder

CACHE = ShardCache("/nowhere", 1)  # all shards are local


def members(number: int) -> dict[str, bytes]:
    meta = {"original_width": 100 + number, "original_height": 90} if number % 2 else {"aesthetic": number / 10}
    return {
        "jpg": picture(number, width=10 + number % 7, height=8 + number % 5),
        "json": json.dumps(meta).encode(),
        "txt": captions(number + 1)[number].encode(),
    }


def write_source(folder: Path, shards: int = 4, each: int = 9, **spoiled: dict[str, bytes]) -> str:
    """Shards of `each` samples; `spoiled`: s<number>={member: bytes}. Returns the brace range."""
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        samples = {number: members(number) | spoiled.get(f"s{number}", {}) for number in numbers}
        rows = [(f"{number:09d}.{name}", data) for number, sample in samples.items() for name, data in sample.items()]
        write_tar(folder / f"{shard:05d}.tar", rows)
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def text_encoder(seed: int = 1) -> WordEncoder:
    return randomized(WordEncoder(), seed).requires_grad_(False)


def encode(spec: str, out: Path, rank: int = 0, world: int = 1, **options: Any) -> Tally:
    settings = {"flip": True, "text": text_encoder(), "batch_size": 4, **options}
    stage = settings.pop("first_stage", None) or first_stage()
    return CacheEncoder(stage, settings.pop("side", SIDE), **settings)(expand(spec), out, CACHE, rank, world)
