"""The sequence of samples depends on seed and shards alone; what cannot be used is counted, nothing is lost."""

import io
import itertools
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import picture, sample, write_shards, write_tar
from faulty import FaultyServer, serving, status, trickle
from PIL import Image
from tiny import workers_are_gone

from ldm.batch import Batch
from ldm.data import sources
from ldm.data.decode import DecodeSample
from ldm.data.sources import ShardCache, expand
from ldm.data.stream import OrderedSamples, SampleStream, Source, batches, count_streams
from ldm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DECODE = DecodeSample(16, random_flip=True, seed=3)
CACHE = ShardCache("unused", 1)
BATCH = 8
Row = tuple[int, str, str, tuple[int, ...], int]


def rows(batch: Batch) -> list[Row]:
    """index, key, caption, cursor, and a sum over the picture that its flip changes."""
    weights = torch.arange(batch["image"][0].numel()).reshape(batch["image"][0].shape)
    return [
        (index, key, caption, tuple(cursor), int((image.long() * weights).sum()))
        for index, key, caption, cursor, image in zip(
            batch["index"].tolist(),
            batch["key"],
            batch["caption"],
            batch["cursor"].tolist(),
            batch["image"],
            strict=True,
        )
    ]


def take(spec: str, n: int, rank: int = 0, world: int = 1, workers: int = 0, **options: object) -> Iterator[Batch]:
    sources = options.pop("sources", None) or [Source(expand(spec))]
    options = {"decode": DECODE, "shuffle": 4, **options}
    options.setdefault("cache", CACHE)
    stream = SampleStream(sources, seed=3, batch_size=BATCH, rank=rank, world=world, **options)
    return itertools.islice(batches(stream, workers), n)


def run(spec: str, n: int, world: int = 1, workers: int = 0, **options: object) -> tuple[list[Row], Counter[str]]:
    """All ranks' samples in order, and what was dropped."""
    got: list[Row] = []
    dropped: Counter[str] = Counter()
    for rank in range(world):
        for batch in take(spec, n, rank, world, workers, **options):
            assert batch["index"].tolist() == sorted(batch["index"].tolist())
            got += rows(batch)
            dropped.update(batch["dropped"])
    return sorted(got), dropped


@pytest.fixture(scope="module")
def flawed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """6 shards of 9 samples, with 9 of the 54 unusable, one to three in a shard."""
    folder = tmp_path_factory.mktemp("flawed")
    spec = write_shards(folder, [9] * 6)
    members = [sample(i) for i in range(54)]
    big = io.BytesIO()
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(big, "JPEG")
    members[4][0] = (members[4][0][0], big.getvalue()[:2000])
    members[5][2] = (members[5][2][0], b"caf\xe9")
    members[13][0] = (members[13][0][0], b"")
    del members[20][2]
    members[29][2] = (members[29][2][0], b"  \n")
    del members[31][0]
    members[38][0] = (members[38][0][0], b"<html>")
    for shard in range(5):
        write_tar(folder / f"{shard:05d}.tar", [m for i in range(9 * shard, 9 * shard + 9) for m in members[i]])
    last = folder / "00005.tar"
    last.write_bytes(last.read_bytes()[: last.read_bytes().index(b"000000052.json")])  # leaves 7 of the 9
    return spec


FLAWS = {
    "image/truncated": 1,
    "caption/not UTF-8": 1,
    "image/empty": 1,
    "caption/missing": 1,
    "caption/empty": 1,
    "image/missing": 1,
    "image/not an image": 1,
    "shard/truncated": 2,  # the manifest says how many the cut hides
}


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 1), (1, 2), (1, 3), (2, 2), (4, 2)])
def test_the_sequence_knows_no_ranks_and_no_workers(tiny_shards: str, world: int, workers: int) -> None:
    assert run(tiny_shards, 20, world, workers) == run(tiny_shards, 20)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (2, 3), (1, 2), (1, 4)])
def test_nor_with_drops(flawed: str, world: int, workers: int) -> None:
    assert run(flawed, 9, world, workers) == run(flawed, 9)


def test_indices_count_and_streams_take_turns(tiny_shards: str) -> None:
    got, dropped = run(tiny_shards, 30)
    assert [index for index, *_ in got] == list(range(240))
    assert all(cursor[0] == index % 8 for index, _, _, cursor, _ in got)
    assert all(caption == f"picture {int(key)}" for _, key, caption, _, _ in got)
    assert not dropped


@pytest.mark.parametrize("stop", [1, 2, 5, 7, 11, 12, 13, 19])
@pytest.mark.parametrize("shuffle", [1, 4, 1024])
def test_stop_and_resume_is_as_if_never_stopped(flawed: str, stop: int, shuffle: int) -> None:
    """Across epochs, with drops, onto other numbers of ranks and workers."""
    whole, dropped = run(flawed, 20, shuffle=shuffle)
    first, dropped_first = run(flawed, stop, world=2, shuffle=shuffle)
    cursors = {cursor[0]: cursor[1:] for _, _, _, cursor, _ in first}
    options = {"shuffle": shuffle, "start": stop * BATCH, "cursors": cursors}
    rest, dropped_rest = run(flawed, 20 - stop, workers=2 if stop in (5, 12) else 0, **options)
    assert first + rest == whole
    assert dropped_first + dropped_rest == dropped


def test_every_epoch_gives_every_sample_once_in_another_order(tiny_shards: str) -> None:
    got, _ = run(tiny_shards, 60, max_streams=2)
    for epoch in range(2):  # of 4 turns, as each stream is dealt 4 of the 8 shards
        keys = [key for _, key, _, cursor, _ in got if cursor[1] // 4 == epoch]
        assert sorted(keys) == [f"{i:09d}" for i in range(96)]


def test_shards_and_samples_are_shuffled_anew_each_epoch(tiny_shards: str) -> None:
    got, _ = run(tiny_shards, 30, max_streams=1, shuffle=1)
    shards = [next(turn)[1] for _, turn in itertools.groupby(got, key=lambda row: row[3][1])]
    assert len(shards) > 16
    assert sorted(shards[:8]) == sorted(shards[8:16])
    assert shards[:8] != shards[8:16]

    got, _ = run(expand(tiny_shards)[0], 6, shuffle=1024)  # one shard of 12
    epochs = [[key for _, key, *_ in got[12 * epoch : 12 * epoch + 12]] for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def test_another_seed_is_another_order(tiny_shards: str) -> None:
    streams = [SampleStream([Source(expand(tiny_shards))], DECODE, seed, 96, CACHE) for seed in (3, 3, 4)]
    keys = [next(iter(stream))["key"] for stream in streams]
    assert keys[0] == keys[1] != keys[2]


def test_no_shuffle_keeps_the_order_within_a_shard(tiny_shards: str) -> None:
    got, _ = run(tiny_shards, 6, shuffle=1, max_streams=1)
    by_turn = itertools.groupby(got, key=lambda row: row[3][1])
    for _, shard in by_turn:
        keys = [int(row[1]) for row in shard]
        assert keys == list(range(keys[0], keys[0] + len(keys)))


def test_unusable_samples_are_counted_and_the_sequence_goes_on(flawed: str) -> None:
    """delivered + dropped = what the manifest promises, in every epoch."""
    got, dropped = run(flawed, 17, max_streams=1, world=1)  # 136 samples: 3 epochs of 45 and one more
    per_epoch = Counter(cursor[1] // 6 for _, _, _, cursor, _ in got)
    assert per_epoch[0] == per_epoch[1] == 6 * 9 - sum(FLAWS.values())
    assert set(dropped) == set(FLAWS)
    assert min(dropped.values()) >= 3
    got, dropped = run(flawed, 100, max_streams=1, world=1)
    full = max(cursor[1] for _, _, _, cursor, _ in got) // 6
    assert all(abs(dropped[reason] / FLAWS[reason] - full) <= 1 for reason in FLAWS)


def test_a_shard_that_vanishes_is_as_many_drops_as_it_promised(tmp_path: Path) -> None:
    spec = write_shards(tmp_path, [8, 8])
    stream = SampleStream([Source(expand(spec))], DECODE, 0, 8, CACHE, max_streams=1)
    (tmp_path / "00001.tar").unlink()
    got = list(itertools.islice(stream, 4))
    assert {int(key) for batch in got for key in batch["key"]} == set(range(8))
    drops = sum(batch["dropped"].get("shard/unreadable", 0) for batch in got)
    assert drops >= 3 * 8
    assert drops % 8 == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_is_an_error_not_a_hang(tmp_path: Path, workers: int) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("0.jpg", picture(0)), ("1.jpg", picture(1))])
    with pytest.raises(UserError, match=r"^none of the 1 shards .* holds a usable sample; dropped: .*caption/missing"):
        list(take(f"{tmp_path}/{{a,b}}.tar", 1, workers=workers))


def test_ranks_that_cannot_share() -> None:
    assert count_streams(13, 64, 1) == 13
    assert count_streams(1000, 64, 8) == 64
    with pytest.raises(UserError, match=r"13 shards make 13 streams, which 2 ranks .* data.max_streams=12"):
        count_streams(13, 64, 2)
    with pytest.raises(UserError, match=r"1 shards .* make 1 streams, fewer than the 4 ranks"):
        count_streams(1, 64, 4)


def test_workers_end_with_the_loader(tiny_shards: str) -> None:
    assert workers_are_gone()
    got = take(tiny_shards, 50, workers=2)
    next(got)
    assert len(multiprocessing.active_children()) == 2
    del got
    assert workers_are_gone()


def test_the_global_generator_is_left_alone(tiny_shards: str, tiny_val: str) -> None:
    before = torch.random.get_rng_state()
    list(take(tiny_shards, 2))
    list(OrderedSamples(expand(tiny_val), DECODE, CACHE).batches(4))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_samples(tiny_val: str, flawed: str, workers: int) -> None:
    samples = OrderedSamples(expand(tiny_val), DecodeSample(16), CACHE, limit=17)
    got = [list(samples.batches(4, rank, 2, workers)) for rank in range(2)]
    assert [[batch["index"].tolist() for batch in part] for part in got] == [
        [[0, 2, 4, 6], [8, 10, 12, 14], [16]],
        [[1, 3, 5, 7], [9, 11, 13, 15]],
    ]
    assert all(batch["key"] == [f"{i:09d}" for i in batch["index"].tolist()] for part in got for batch in part)
    assert got[0][0]["image"].shape == (4, 3, 16, 16)

    bad = list(OrderedSamples(expand(flawed), DecodeSample(16), CACHE).batches(2, num_workers=workers))
    dropped = sum((Counter(batch["dropped"]) for batch in bad), Counter())
    assert sum(len(batch["key"]) for batch in bad) == 6 * 9 - sum(FLAWS.values())
    assert all(batch["key"] for batch in bad)
    assert dropped["caption/empty"] == dropped["image/missing"] == 1


def test_ordered_samples_asked_for_more_than_there_are(tiny_val: str) -> None:
    assert len(OrderedSamples(expand(tiny_val), DECODE, CACHE, 22)) == 21


def test_real_shards() -> None:
    folder = Path(__file__).parents[2] / "shared" / "data" / "clipart"
    if not folder.is_dir():
        pytest.skip("no clipart shards beside the repository")
    stream = SampleStream([Source(expand(f"{folder}/{{00000..00012}}.tar"))], DecodeSample(64), 0, 130, CACHE)
    got = list(itertools.islice(stream, 3))
    assert all(batch["image"].shape == (130, 3, 64, 64) for batch in got)
    assert len({key for batch in got for key in batch["key"]}) == 390
    assert not any(batch["dropped"] for batch in got)


def test_fields_that_travel_with_the_picture(tiny_shards: str) -> None:
    (batch,) = take(tiny_shards, 1)
    assert batch["original_size"].shape == batch["crop"].shape == (BATCH, 2)
    numbers = [int(key) for key in batch["key"]]
    assert batch["original_size"].tolist() == [[16 + n % 13, 16 + n % 17] for n in numbers]


class Even:
    """A filter: keeps every other caption."""

    def __call__(self, record: object) -> bool:
        return int(record["caption"].split()[1]) % 2 == 0


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 2), (1, 2)])
def test_filters_keep_the_promise_and_count(flawed: str, world: int, workers: int) -> None:
    options = {"decode": DecodeSample(16, random_flip=True, random_crop=True, filters={"even": Even()}, seed=3)}
    if world == 4:
        options["max_streams"] = 4
    whole = run(flawed, 12, **({"max_streams": 4} if world == 4 else {}) | options)
    assert run(flawed, 12, world, workers, **options) == whole
    assert all(int(key) % 2 == 0 for _, key, *_ in whole[0])
    assert whole[1]["filter/even"] > 90


def two_sources(folder: Path) -> list[Source]:
    a, b = folder / "a", folder / "b"
    a.mkdir()
    b.mkdir()
    first, second = write_shards(a, [12] * 8), write_shards(b, [10] * 4)
    return [Source(expand(first), 3.0), Source(expand(second), 1.0)]


def test_sources_are_mixed_by_weight_on_any_ranks_and_through_a_resume(tmp_path: Path) -> None:
    sources = two_sources(tmp_path)
    whole, _ = run("", 60, sources=sources)
    from_second = sum(cursor[0] >= 4 for _, _, _, cursor, _ in whole) / len(whole)
    assert abs(from_second - 0.25) < 0.06  # 480 draws: three standard deviations
    for world, workers in [(2, 0), (4, 1), (1, 3), (2, 2)]:
        assert run("", 60, world, workers, sources=sources)[0] == whole
    cursors = {cursor[0]: cursor[1:] for _, _, _, cursor, _ in whole[: 17 * BATCH]}
    rest, _ = run("", 43, 2, sources=sources, start=17 * BATCH, cursors=cursors)
    assert rest == whole[17 * BATCH :]
    once = Counter(key for _, key, _, cursor, _ in whole if cursor[0] < 4 and cursor[1] < 2)  # 2 of 8 shards a stream
    assert set(once.values()) == {1}
    assert len(once) == 96


def test_resume_seeks(tmp_path: Path) -> None:
    """A resumed stream reads from the shard it stood in on, less than two shards' bytes."""
    spec = write_shards(tmp_path, [60] * 6)
    opened = []

    class Counting(ShardCache):
        def open(self, path: str) -> io.BufferedReader:
            opened.append(path)
            return super().open(path)

    whole, _ = run(spec, 40, max_streams=2)
    cursors = {cursor[0]: cursor[1:] for _, _, _, cursor, _ in whole[: 39 * BATCH]}
    stream = SampleStream(
        [Source(expand(spec))],
        DECODE,
        3,
        BATCH,
        Counting("unused", 1),
        shuffle=4,
        max_streams=2,
        start=39 * BATCH,
        cursors=cursors,
    )
    batch = next(iter(stream))
    assert rows(batch) == whole[39 * BATCH :]
    assert len(opened) <= 2 * 2


class NotAhead(ShardCache):
    """Fetches a shard when it is opened."""

    def fetch_ahead(self, path: str) -> None:
        pass


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyServer, str]]:
    """6 shards of 12 samples behind a slow server, for two streams."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.01)
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [12] * 6)
    with serving() as server:
        for path in (tmp_path / "shards").iterdir():
            server.files[f"/{path.name}"] = path.read_bytes()
            server.faults[f"/{path.name}"] = [trickle] if path.suffix == ".tar" else []
        yield server, f"http://{server.address}/{{00000..00005}}.tar"


def test_the_next_shards_are_there_before_they_are_opened(remote: tuple[FaultyServer, str], tmp_path: Path) -> None:
    server, spec = remote
    found = []

    class Noting(ShardCache):
        def open(self, path: str) -> io.BufferedReader:
            found.append(sources._use(self.folder / sources._copy_name(path)))
            return super().open(path)

    for _ in take(spec, 9, max_streams=2, cache=Noting(tmp_path / "cache", 10**9)):  # 72 samples: all, once
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "cache").glob("*.tar"))) < min(6, len(found) + 2) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert found == [False] * 2 + [True] * 4
    assert set(server.requests.values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_fetching_ahead_changes_no_sample(remote: tuple[FaultyServer, str], tmp_path: Path, workers: int) -> None:
    server, spec = remote
    ahead = run(spec, 20, 1, workers, max_streams=2, cache=ShardCache(tmp_path / "ahead", 10**9))
    assert not any(server.faults.values())  # the server is slow once
    plain = run(spec, 20, max_streams=2, cache=NotAhead(tmp_path / "plain", 10**9))
    assert ahead == plain == run(spec, 20, 2, workers, max_streams=2, cache=ShardCache(tmp_path / "tiny", 1))
    assert not plain[1]


def test_a_next_shard_that_cannot_be_reached_is_counted_once(
    remote: tuple[FaultyServer, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, spec = remote
    server.faults.clear()
    got = []
    for cache in (NotAhead(tmp_path / "plain", 10**9, retries=1), ShardCache(tmp_path / "ahead", 10**9, retries=1)):
        caplog.clear()
        server.faults["/00003.tar"] = [status(500)] * 9
        got.append(run(spec, 8, max_streams=1, cache=cache))  # 64 samples: all 60, and some of the next epoch
        assert caplog.text.count("/00003.tar: given up after 2 attempts") == len(caplog.records) == 1
    assert got[0] == got[1]
    assert got[1][1] == {"shard/unreachable": 12}  # as many samples as its side file promises
