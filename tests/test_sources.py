"""Names of shards, and the cache against real servers that fail, on loopback."""

import logging
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import sample, write_tar
from faulty import Fault, FaultyServer, cut, serving, stall, status, trickle
from torch.utils.data import DataLoader

from ldm.data import remote, sources
from ldm.data.shards import BadSample
from ldm.data.sources import ShardCache, expand
from ldm.errors import UserError


def shard(number: int, size: int = 100_000) -> bytes:
    return random.Random(number).randbytes(size)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.01)


# --- names ----------------------------------------------------------------------------------------------------------


def test_expand_keeps_the_order_as_written(tiny_shards: str) -> None:
    paths = expand(tiny_shards)
    assert [Path(path).name for path in paths] == [f"{i:05d}.tar" for i in range(8)]
    assert expand([paths[3], paths[1]]) == [paths[3], paths[1]]


def test_expand_takes_urls_as_they_are() -> None:
    spec = ["s3://bucket/{0..2}.tar", "gs://bucket/0.tar", "http://host/a.tar?x=1", "https://host/{a,b}.tar"]
    urls = [f"s3://bucket/{i}.tar" for i in range(3)]
    urls += ["gs://bucket/0.tar", "http://host/a.tar?x=1", "https://host/a.tar", "https://host/b.tar"]
    assert expand(spec) == urls
    assert expand("pipe:cat {0..1}.tar", allow_pipe=True) == ["pipe:cat 0.tar", "pipe:cat 1.tar"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pipe:cat /etc/passwd", r"is a shell command.*data\.allow_pipe=true"),
        ("{pipe:id,pipe:ls}", "is a shell command"),
        ("{pip,x}e:id", "is a shell command"),
        ("file:///etc/passwd", "neither a local path nor one of s3://, gs://, http://, https://"),
        ("ftp://host/0.tar", "neither a local path"),
        ("s3:bucket/0.tar", "neither a local path"),
        ("S3://bucket/0.tar", "neither a local path"),
        ("", "names no shard"),
        ([], "names no shard"),
        ("data/{0..999999999}.tar", "more than 1000000"),
        ("data/{0..9999}{0..9999}.tar", "more than 1000000"),
        ("s3://bucket/{0..999999999}.tar", "more than 1000000"),
        ("data/{0.." + "9" * 5000 + "}.tar", "endless number"),
        ("data/{00..5.tar", "unbalanced braces"),
        ("s3://bucket/{0,0}.tar", "listed twice"),
        ("/", "not a file"),
        ("nowhere.txt", "cannot be read: No such file"),
        ("s3://bucket/list.txt", "expected a local text file"),
    ],
)
def test_expand_refuses(spec: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(spec)


def test_expand_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SHARDS", 100)
    with pytest.raises(UserError, match="more than 100 shards"):
        expand("{a,b}" * 40)
    with pytest.raises(UserError, match="more than 100 shards"):
        expand(["{1..60}", "{61..120}"])
    (tmp_path / "list.txt").write_text("s3://bucket/{0..99}.tar\n" * 3)
    with pytest.raises(UserError, match="more than 100 shards"):
        expand(str(tmp_path / "list.txt"))


def test_expand_names_the_missing_the_doubled_and_the_way_out(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", sample(0))
    with pytest.raises(UserError, match=r"b\.tar' is not a file \(2 of 3 are missing\); make them with: make data"):
        expand(f"{tmp_path}/{{a,b,c}}.tar", how_to_make="make data")
    with pytest.raises(UserError, match=r"a\.tar' is listed twice"):
        expand([str(one), str(one)])


def test_doubles_are_found_in_linear_time() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"99999\.tar' is listed twice"):
        expand(["s3://bucket/{0..99999}.tar", "s3://bucket/99999.tar"])
    assert time.monotonic() - began < 60


def test_a_list_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "#c"):
        write_tar(tmp_path / f"{name}.tar", sample(0))
    lines = ["\ufeff# shards", "", "  {a,b}.tar  ", "s3://bucket/{0..1}.tar", "./#c.tar"]
    expected = ["a.tar", "b.tar", "s3://bucket/0.tar", "s3://bucket/1.tar", "./#c.tar"]
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "list.txt").write_bytes(end.join(lines).encode())
        assert expand("list.txt") == expected
    assert expand([str(tmp_path / "list.txt"), "gs://bucket/0.tar"]) == [*expected, "gs://bucket/0.tar"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"pipe:touch owned", r"data\.allow_pipe=true"),
        (b"file:///etc/passwd", "neither a local path"),
        (b"s3://bucket/{0..999999999}.tar", "more than 1000000"),
        (b"s3://bucket/0.tar\ns3://bucket/0.tar\r\n", "listed twice"),
        (b"other.txt", "a list holds shards only"),
        (b"/etc/pass\0wd", "not a file"),
        (b"\xff\xfe0", "not UTF-8"),
        (b"# nothing\n", "names no shard"),
    ],
)
def test_a_list_file_is_not_trusted(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UserError, match=message):
        expand(str(tmp_path / "list.txt"))


def test_a_list_of_any_length_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "list.txt", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="more than 268435456 bytes"):
        expand(str(tmp_path / "list.txt"))


# --- the cache, over http and s3 ------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where shards lie: `put` them, name them by `url`, make them fail."""

    prefix: str
    server: FaultyServer
    store: Callable[[str, bytes], object]
    number: int = 0

    def put(self, data: bytes, name: str = "", faults: list[Fault] | None = None) -> str:
        """-> the URL of a new file."""
        self.number += 1
        name = name or f"{self.number}.tar"
        self.store(name, data)
        self.server.faults[f"/shards/{name}"] = faults or []
        return f"{self.prefix}/{name}"

    def requests(self, url: str) -> int:
        return self.server.requests[url.replace(self.prefix, "/shards")]


@pytest.fixture(scope="module")
def http() -> Iterator[Place]:
    pytest.importorskip("aiohttp")
    with serving() as server:
        prefix = f"http://{server.address}/shards"
        yield Place(prefix, server, lambda name, data: server.files.update({f"/shards/{name}": data}))


@pytest.fixture(scope="module")
def s3() -> Iterator[Place]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "mysecret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        upstream = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        upstream.start()
        host, port = upstream.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="shards")
        with serving(f"{host}:{port}") as server:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{server.address}")
            yield Place(
                "s3://shards", server, lambda name, data: client.put_object(Bucket="shards", Key=name, Body=data)
            )
        upstream.stop()


@pytest.fixture(params=["http", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make(folder: Path, max_bytes: int = 10**9, retries: int = 4, timeout: float = 5.0) -> ShardCache:
    return ShardCache(folder, max_bytes, retries, timeout)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(cache: ShardCache, path: str) -> bytes:
    with cache.open(path) as file:
        return file.read()


def run_all(target: Callable[..., object], *arguments: tuple[Any, ...]) -> None:
    """One forked process for each tuple of arguments; all must end well."""
    processes = [multiprocessing.get_context("fork").Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_a_local_path_comes_back_as_it_is(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"a")
    cache = make(folder)
    assert cache.local(str(tmp_path / "a.tar")) == str(tmp_path / "a.tar")
    assert read(cache, str(tmp_path / "a.tar")) == b"a"
    with pytest.raises(FileNotFoundError):
        cache.open(str(tmp_path / "b.tar"))
    assert not folder.exists()


def test_a_shard_is_fetched_once(place: Place, folder: Path) -> None:
    cache = make(folder)
    url = place.put(shard(0))
    assert read(cache, url) == shard(0)
    assert Path(cache.local(url)).read_bytes() == shard(0)
    assert read(pickle.loads(pickle.dumps(cache)), url) == shard(0)
    assert place.requests(url) == 1
    assert read(cache, place.put(b"")) == b""
    assert all(len(name) == 68 and name.endswith(".tar") for name in names(folder))  # no lock, no partial file


@pytest.mark.parametrize("fault", [status(500), status(503), cut, stall], ids=["500", "503", "cut", "stall"])
def test_what_may_pass_is_tried_again(place: Place, folder: Path, fault: Fault) -> None:
    url = place.put(shard(0), faults=[fault, fault])
    timeout = 1.5 if fault is stall else 30
    assert read(make(folder, retries=2, timeout=timeout), url) == shard(0)
    assert place.requests(url) == 3
    url = place.put(shard(1), faults=[fault] * 2)
    with pytest.raises(BadSample, match="shard/unreachable"):
        make(folder, retries=1, timeout=timeout).open(url)
    assert place.requests(url) == 2
    assert len(names(folder)) == 1


def test_slow_is_not_stalled(place: Place, folder: Path) -> None:
    assert read(make(folder, retries=0, timeout=1.2), place.put(shard(0), faults=[trickle])) == shard(0)


def test_what_stays_is_not_tried_again(place: Place, folder: Path) -> None:
    for fault, reason in ((status(404), "shard/not found"), (status(403), "shard/access denied")):
        url = place.put(shard(0), faults=[fault])
        with pytest.raises(BadSample, match=reason):
            make(folder).local(url)
        assert place.requests(url) == 1
    with pytest.raises(BadSample, match="shard/not found"):
        make(folder).local(f"{place.prefix}/nowhere.tar")
    assert names(folder) == []


def test_nobody_listens(folder: Path) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(BadSample, match="shard/unreachable"):
        make(folder, retries=1).local("http://127.0.0.1:9/a.tar")


def test_names_from_data_do_not_reach_the_file_system(http: Place, folder: Path) -> None:
    for name in ("..%2F..%2Fx", "😀" * 50 + ".tar", "x" * 300, "a.tar/", "a.partial", "a.lock", "a.Tar"):
        http.server.files[f"/shards/{quote(name, safe='/%')}"] = b"data"
        assert read(make(folder, retries=0), f"{http.prefix}/{name}") == b"data"
    assert all(sources._COPY.fullmatch(name) for name in names(folder))
    assert sorted(name[64:] for name in names(folder)) == [".bin"] * 3 + [".lock", ".partial", ".tar", ".tar"]


def test_secrets_are_not_shown(place: Place, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    url = place.put(shard(0), faults=[status(403), status(500)])
    secret = url.replace("http://", "http://me:mysecret@")
    if secret != url:
        secret += "?X-Amz-Credential=AKIASECRET&X-Amz-Signature=mysecret"
    for reason in ("denied", "unreachable"):
        with pytest.raises(BadSample, match=reason) as caught:
            make(folder, retries=0).local(secret)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
    assert caplog.text.count(f"{url}: given up after 1 attempts") == 1
    assert "SECRET" not in caplog.text.upper()


# --- bounds and processes -------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_and_open_files_stay(place: Place, folder: Path) -> None:
    cache = make(folder, max_bytes=250_000)
    a, b, c, d = (place.put(shard(i)) for i in range(4))
    folder.mkdir()
    (folder / "mine.tar").write_bytes(shard(9, 10**6))
    with cache.open(a) as file:
        read(cache, b)
        os.utime(cache.local(a), ns=(0, 0))  # older than b, whatever the clock's resolution
        read(cache, c)
        assert file.read() == shard(0)
    os.utime(cache.local(b), ns=(0, 0))
    os.utime(cache.local(c), ns=(1, 1))
    read(cache, b)  # used again
    read(cache, d)
    for url in (b, d):
        read(cache, url)
    assert [place.requests(url) for url in (a, b, c, d)] == [1] * 4
    assert len(names(folder)) == 3
    assert (folder / "mine.tar").exists()
    read(cache, a)
    assert place.requests(a) == 2


def test_a_shard_larger_than_the_cache(http: Place, folder: Path) -> None:
    cache = make(folder, max_bytes=1000)
    for number in range(2):
        url = http.put(shard(number))
        assert read(cache, url) == shard(number)
        assert read(cache, url) == shard(number)
        assert http.requests(url) == 1
        assert len(names(folder)) == 1


def test_processes_that_want_the_same_shards_share_them(place: Place, folder: Path) -> None:
    urls = [place.put(shard(number), faults=[trickle]) for number in range(3)]
    read(make(folder), place.put(shard(9)))  # the parent has connections of its own

    def child(first: int) -> None:
        for number in range(3):
            number = (number + first) % 3
            assert read(make(folder), urls[number]) == shard(number)

    run_all(child, (0,), (0,), (1,), (2,))
    assert [place.requests(url) for url in urls] == [1, 1, 1]
    assert len(names(folder)) == 4
    read(make(folder), place.put(shard(9)))


def test_processes_that_remove_what_others_are_about_to_open(http: Place, folder: Path) -> None:
    urls = [http.put(shard(number)) for number in range(3)]

    def child(first: int) -> None:
        for step in range(30):
            number = (step + first) % 3
            assert read(make(folder, max_bytes=1), urls[number]) == shard(number)

    run_all(child, (0,), (1,), (2,))
    assert len(names(folder)) <= 3


def test_a_process_killed_while_fetching_leaves_nothing_visible(place: Place, folder: Path) -> None:
    url = place.put(shard(0), faults=[stall])
    first, second = (
        multiprocessing.get_context("fork").Process(target=make(folder, timeout=30).local, args=(url,))
        for _ in range(2)
    )
    first.start()
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.start()
    second.join(0.3)
    assert second.is_alive()  # waits
    assert {Path(name).suffix for name in names(folder)} == {".partial", ".lock"}
    os.kill(first.pid, signal.SIGKILL)
    second.join(60)
    assert second.exitcode == 0
    assert [Path(name).suffix for name in names(folder)] == [".tar"]
    assert read(make(folder), url) == shard(0)
    assert place.requests(url) == 2


def test_partial_files_of_the_dead_are_removed_in_time(http: Place, folder: Path) -> None:
    folder.mkdir()
    old, new = (folder / f"{digit * 64}.tar.7-{'0' * 32}.partial" for digit in "ab")
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    make(folder).local(http.put(shard(0)))
    assert not old.exists()
    assert new.exists()


class Lengths:
    """A map-style dataset: the length of each shard."""

    def __init__(self, cache: ShardCache, paths: list[str]) -> None:
        self.cache = cache
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        return len(read(self.cache, self.paths[index]))


def test_workers_of_a_data_loader(place: Place, folder: Path) -> None:
    urls = [place.put(shard(number, 1000 + number)) for number in range(4)]
    cache = make(folder)
    read(cache, urls[0])
    for _ in range(2):
        loader = DataLoader(Lengths(cache, urls), batch_size=None, num_workers=2)
        assert list(loader) == [1000, 1001, 1002, 1003]
    assert [place.requests(url) for url in urls] == [1] * 4


def test_a_folder_that_cannot_be_used(
    http: Place, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = http.put(shard(0))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="Not a directory; use a local disk"):
        make(tmp_path / "file" / "cache").local(url)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.Store, "fetch", full)
    monkeypatch.setitem(remote.FETCHERS, "http", full)
    with pytest.raises(UserError, match="No space left on device"):
        make(folder).local(url)
    assert names(folder) == []


@pytest.mark.parametrize("numbers", [{"max_bytes": 0}, {"retries": -1}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_numbers_out_of_range(folder: Path, numbers: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected 1 or more, 0 or more, more than 0 seconds"):
        make(folder, **numbers)


# --- ahead ----------------------------------------------------------------------------------------------------------


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_was_fetched_ahead_is_there(place: Place, folder: Path) -> None:
    cache = make(folder)
    folder.mkdir()
    waited, unwaited = (place.put(shard(number), faults=[trickle]) for number in range(2))
    cache.fetch_ahead(waited)
    until(lambda: [Path(name).suffix for name in names(folder)] == [".tar"])
    assert read(cache, waited) == shard(0)
    cache.fetch_ahead(unwaited)
    until(lambda: place.requests(unwaited))
    assert read(pickle.loads(pickle.dumps(cache)), unwaited) == shard(1)  # it waits for the one that is under way
    assert place.requests(waited) == place.requests(unwaited) == 1


def test_a_local_shard_is_not_fetched_ahead(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_background", None)
    make(folder).fetch_ahead(str(tmp_path / "a.tar"))


def test_what_fails_ahead_is_tried_and_told_once_when_it_is_opened(
    place: Place, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    cache = make(folder, retries=1)
    folder.mkdir()
    once, often = place.put(shard(0), faults=[status(500)]), place.put(shard(1), faults=[status(500)] * 3)
    for url in (once, often):
        cache.fetch_ahead(url)
    until(lambda: [place.requests(url) for url in (once, often)] == [1, 1] and names(folder) == [])
    assert read(cache, once) == shard(0)
    assert not caplog.records
    with pytest.raises(BadSample, match="shard/unreachable"):
        cache.open(often)
    assert [place.requests(url) for url in (once, often)] == [2, 3]
    assert len(caplog.records) == 1
    assert "given up after 2 attempts" in caplog.text


def test_a_cache_that_is_too_small_to_fetch_ahead(
    http: Place, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "AHEAD", 1)  # one after another
    sources._background.cache_clear()
    urls = [http.put(shard(number)) for number in range(6)]
    cache = make(folder, max_bytes=250_000)
    for url in urls[:5]:
        cache.fetch_ahead(url)
    until(lambda: caplog.records)  # the third put the first out
    assert "raise data.cache.max_bytes" in caplog.text
    cache.fetch_ahead(urls[5])
    for url, number in zip(urls, range(6), strict=True):
        assert read(cache, url) == shard(number)
    assert [http.requests(url) for url in urls][3:] == [1, 1, 1]
    assert sum(http.requests(url) for url in urls) <= 9
    assert len(caplog.records) == 1
    sources._background.cache_clear()


def test_a_fork_fetches_ahead_by_itself_and_its_end_waits_for_nothing(place: Place, folder: Path) -> None:
    first, second, stalled = place.put(shard(0)), place.put(shard(1)), place.put(shard(2), faults=[stall])
    cache = make(folder, timeout=60)
    folder.mkdir()
    cache.fetch_ahead(first)
    until(lambda: [Path(name).suffix for name in names(folder)] == [".tar"])

    def child() -> None:
        cache.fetch_ahead(second)
        until(lambda: sum(name.endswith(".tar") for name in names(folder)) == 2)
        cache.fetch_ahead(stalled)
        until(lambda: any(name.endswith(".partial") for name in names(folder)))

    began = time.monotonic()
    run_all(child, ())
    assert time.monotonic() - began < 25  # the server says nothing for 30 s
    assert place.requests(second) == 1
    assert read(cache, stalled) == shard(2)


# --- commands and side files ----------------------------------------------------------------------------------------


def test_a_command(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a b.tar").write_bytes(shard(0))
    count = tmp_path / "count"
    command = f"pipe:echo >>{count}; cat '{tmp_path}/a b.tar'"
    cache = make(folder, retries=1)
    for _ in range(2):
        assert read(cache, command) == shard(0)
    assert count.read_text() == "\n"
    assert cache.sidecar(command, "_stats.json") is None
    with pytest.raises(BadSample, match="shard/unreachable"):
        cache.local(f"{command}; false")
    assert count.read_text() == "\n" * 3


def test_side_files(place: Place, folder: Path) -> None:
    url = place.put(shard(0), "00012.tar")
    place.put(b"{}", "00012_stats.json")
    cache = make(folder)
    for _ in range(2):
        assert cache.sidecar(url, "_stats.json") == b"{}"
        assert cache.sidecar(url, "_other.json") is None
    assert place.requests(url) == 0
    assert place.requests(f"{place.prefix}/00012_stats.json") == 1
    assert place.requests(f"{place.prefix}/00012_other.json") == 1
    place.put(b"{}", "00013_stats.json", [status(500)])
    with pytest.raises(BadSample, match="shard/unreachable"):
        make(folder, retries=0).sidecar(f"{place.prefix}/00013.tar", "_stats.json")


def test_side_files_keep_the_query(http: Place, folder: Path) -> None:
    http.put(b"{}", "v1.5_stats.json")
    assert make(folder).sidecar(f"{http.prefix}/v1.5.tar?download=a/b.c", "_stats.json") == b"{}"


def test_local_side_files(tmp_path: Path, folder: Path) -> None:
    cache = make(folder)
    assert cache.sidecar(f"{tmp_path}/a.tar", "_stats.json") is None
    (tmp_path / "a_stats.json").write_bytes(b"{}")
    assert cache.sidecar(f"{tmp_path}/a.tar", "_stats.json") == b"{}"
    (tmp_path / "b_stats.json").mkdir()
    with pytest.raises(BadSample, match="sidecar unreadable"):
        cache.sidecar(f"{tmp_path}/b.tar", "_stats.json")


def test_side_files_are_bounded(place: Place, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SIDECAR", 10)
    place.put(bytes(11), "a_stats.json")
    (tmp_path / "a_stats.json").write_bytes(bytes(11))
    for path in (f"{place.prefix}/a.tar", str(tmp_path / "a.tar")):
        with pytest.raises(BadSample, match="sidecar too large"):
            make(folder).sidecar(path, "_stats.json")
    assert names(folder) == []
