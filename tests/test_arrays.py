"""Arrays: the cache's samples, in a sequence of their own that ranks, workers and interruptions do not change."""

import pickle
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cached import CACHE, encode, write_source
from tiny import SIDE, workers_are_gone

from ldm.batch import Batch
from ldm.data.array_datamodule import ArrayDataModule
from ldm.data.arrays import LatentArrays, pack
from ldm.data.latents import DecodeLatents
from ldm.data.sources import expand
from ldm.data.stream import OrderedSamples
from ldm.errors import UserError
from ldm.keyed_random import KeyedRandom
from ldm.training.caching import cached_text

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TRAINED = 30  # rows; 6 are held out


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache")
    encode(write_source(tmp_path_factory.mktemp("source")), out)
    return out


@pytest.fixture(scope="module")
def folder(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arrays")
    assert pack(cache, out, CACHE).delivered == 36
    return out


def make(folder: Path, rank: int = 0, world: int = 1, **changes: Any) -> ArrayDataModule:
    options = {"side": SIDE, "batch_size": 8, "steps": 12, "seed": 3, "val_batch_size": 4, "val_samples": 6}
    options |= {"val_shards": None, "run_dir": str(folder / "run"), "random_flip": True, **changes}
    data = ArrayDataModule(str(folder), **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return data


def ordered(cache: Path) -> Batch:
    """All samples of the tars, as the tar reader gives them."""
    paths = expand(f"{cache}/{{00000..00003}}.tar")
    (batch,) = OrderedSamples(paths, DecodeLatents(str(cache), SIDE), CACHE).batches(64)
    return batch


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def test_the_columns_hold_what_the_tars_hold(cache: Path, folder: Path):
    arrays, tars = LatentArrays(folder), ordered(cache)
    rows = np.arange(36)
    batch = arrays.batch(rows, tars["index"], tars["cursor"])
    assert batch.keys() == tars.keys()
    assert [name for name in tars if not same(batch[name], tars[name])] == []
    mixed = arrays.batch(rows[[5, 0, 35, 5]], tars["index"][:4], tars["cursor"][:4])
    assert mixed["key"] == [tars["key"][i] for i in (5, 0, 35, 5)]
    assert torch.equal(mixed["text_tokens"], tars["text_tokens"][[5, 0, 35, 5]])
    assert torch.equal(mixed["moments"], tars["moments"][[5, 0, 35, 5]])
    mixed["moments"] += 1  # its own memory
    assert torch.equal(arrays.batch(rows, tars["index"], tars["cursor"])["moments"], tars["moments"])


def test_flips_are_those_of_the_tars(cache: Path, folder: Path):
    arrays, decode = LatentArrays(folder), DecodeLatents(str(cache), SIDE, random_flip=True, seed=3)
    (tars,) = OrderedSamples(expand(f"{cache}/{{00000..00003}}.tar"), decode, CACHE).batches(64)
    mirrored = KeyedRandom(3, tars["index"]).uniform("flip") < 0.5
    assert 5 < mirrored.sum() < 31
    batch = arrays.batch(np.arange(36), tars["index"], tars["cursor"], mirrored)
    assert torch.equal(batch["moments"], tars["moments"])


def test_each_epoch_is_another_permutation(folder: Path):
    data = make(folder, batch_size=10)
    keys = [batch["key"] for batch in data.train_dataloader()]
    epochs = [[key for part in keys[i : i + 3] for key in part] for i in range(0, 12, 3)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == sorted(f"{i:09d}" for i in range(TRAINED)) for epoch in epochs)
    other = next(iter(make(folder, batch_size=10, seed=4).train_dataloader()))
    assert other["key"] != keys[0]


def rows(batches: list[Batch]) -> dict[int, tuple[Any, ...]]:
    return {
        index: (key, caption, moments.tobytes(), tuple(cursor))
        for batch in batches
        for index, key, caption, moments, cursor in zip(
            batch["index"].tolist(),
            batch["key"],
            batch["caption"],
            batch["moments"].numpy(),
            batch["cursor"].tolist(),
            strict=True,
        )
    }


def test_any_ranks_and_workers_make_the_same_global_batches(folder: Path):
    whole = [rows([batch]) for batch in make(folder).train_dataloader()]
    assert [list(batch) for batch in whole] == [list(range(8 * i, 8 * i + 8)) for i in range(12)]
    for world in (1, 2, 4):
        for workers in (0, 1, 2):
            ranks = [list(make(folder, rank, world, num_workers=workers).train_dataloader()) for rank in range(world)]
            assert [rows(list(parts)) for parts in zip(*ranks, strict=True)] == [
                {i: batch[i] for rank in range(world) for i in sorted(batch) if i % world == rank} for batch in whole
            ]
    assert workers_are_gone()


def test_a_resume_goes_on_with_the_next_sample_on_other_ranks_and_another_batch(folder: Path):
    whole = rows(list(make(folder).train_dataloader()))
    data = make(folder)
    for batch in islice(data.train_dataloader(), 5):  # the loader may read ahead: that does not count
        data.consumed(batch)
    state = data.state_dict()
    assert (state["samples_seen"], state["batches_seen"]) == (40, 5)
    got = {}
    for rank in range(4):
        second = make(folder, rank, 4, num_workers=rank % 2, batch_size=12, steps=9)
        second.load_state_dict(pickle.loads(pickle.dumps(state)))
        got |= rows(list(second.train_dataloader()))
    assert got == {i: whole[i] for i in range(40, 88)}


def test_the_order_is_named_in_the_checkpoint(folder: Path, cache: Path):
    state = make(folder).state_dict()
    with pytest.raises(UserError, match=r"data.seed=3, this run has 4"):
        make(folder, seed=4).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.folder=30 rows of cache \w+, this run has 31 rows"):
        make(folder, val_samples=5).load_state_dict(state)


def test_validation_is_the_last_rows_or_shards(cache: Path, folder: Path, tmp_path: Path):
    data = make(folder)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [batch["key"] for batch in batches] == [[f"{i:09d}" for i in part] for part in ((30, 31, 32, 33), (34, 35))]
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    halves = [list(make(folder, rank, 2).val_dataloader()) for rank in range(2)]
    assert [[batch["index"].tolist() for batch in half] for half in halves] == [[[0, 2, 4]], [[1, 3, 5]]]
    pictures = make(folder, val_shards=write_source(tmp_path, 1), val_samples=3)
    assert [batch["image"].shape[0] for batch in pictures.val_dataloader()] == [3]
    assert pictures.rows == 36
    latents = make(folder, val_shards=f"{cache}/00001.tar")
    assert next(iter(latents.val_dataloader()))["key"] == [f"{i:09d}" for i in range(9, 13)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 16}, r"was encoded at 8 px, data.side=16"),
        ({"val_samples": 36}, r"has 36 rows, all held out by data.val_samples=36"),
        ({"batch_size": 9}, r"batch_size=9 cannot be split over 2 ranks"),
        ({"batch_size": 0}, r"data.batch_size=0; expected 1"),
    ],
)
def test_refusals(folder: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        make(folder, 0, 2, **changes).setup("fit")


def test_flips_that_were_not_encoded_are_refused(tmp_path: Path):
    (tmp_path / "source").mkdir()
    encode(write_source(tmp_path / "source", 1), tmp_path / "cache", flip=False, text=None)
    pack(tmp_path / "cache", tmp_path / "arrays", CACHE)
    with pytest.raises(UserError, match=r"random_flip=true, but .* encode with `ldm shards encode --flip"):
        make(tmp_path / "arrays", val_samples=2)
    batch = next(iter(make(tmp_path / "arrays", val_samples=2, random_flip=False).train_dataloader()))
    assert batch["moments"].shape == (8, 4, 4, 4)
    assert "text_tokens" not in batch


def test_arrays_that_are_not_whole_are_refused(cache: Path, folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"cache.json cannot be read .*; make it with ldm shards pack"):
        LatentArrays(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no whole arrays .*moments.npy.*; make them with ldm shards pack"):
        LatentArrays(cache)  # tars
    spoil = {
        "moments.npy": lambda data: data[:-1],
        "places.npy": lambda data: data[:40],
        "captions.bin": lambda data: data[:-1],
        "keys.npy": lambda data: (folder / "places.npy").read_bytes(),
        "vectors.npy": lambda data: (folder / "keys.npy").read_bytes()[:-8],
        "token_ends.npy": lambda data: b"",
    }
    for name, change in spoil.items():
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / name).write_bytes(change((folder / name).read_bytes()))
        with pytest.raises(UserError, match=r"no whole arrays|do not fit each other"):
            LatentArrays(tmp_path / name)


def test_pack_refuses_half_a_cache_and_counts_what_it_drops(cache: Path, tmp_path: Path):
    shutil.copytree(cache, tmp_path / "cache")
    tar = tmp_path / "cache" / "00002.tar"
    data = tar.read_bytes()
    tar.unlink()
    with pytest.raises(UserError, match=r"00002.tar' is not a file \(1 of 4 are missing\); .*ldm shards encode"):
        pack(tmp_path / "cache", tmp_path / "out", CACHE)
    tar.write_bytes(data.replace(b"sky", b"s\xffy").replace(b"red", b"r\xffd"))
    tally = pack(tmp_path / "cache", tmp_path / "out", CACHE)
    assert tally.delivered == len(LatentArrays(tmp_path / "out")) == 33
    assert tally.dropped == {"caption/not UTF-8": 3}
    with pytest.raises(UserError, match="holds a cache already"):
        pack(tmp_path / "cache", tmp_path / "out", CACHE)


def test_the_arrays_serve_cached_text_and_open_again_in_another_process(folder: Path):
    tokens, mask, vector = cached_text(str(folder))(["", ""])
    assert (tokens.shape, mask.tolist(), vector.shape) == ((2, 4, 8), [[True, False, False, False]] * 2, (2, 8))
    sent = pickle.dumps(LatentArrays(folder))
    assert len(sent) < 1000
    assert len(pickle.loads(sent)) == 36
