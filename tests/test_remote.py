"""One attempt to fetch a shard: routing, time-outs, processes, and what a missing package says."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import FaultyServer, serving, stall, status, trickle
from tiny import ROOT

from ldm.data.remote import DENIED, FETCHERS, NOT_FOUND, Meter, final_reason, scheme_of, shown
from ldm.data.shards import BadSample

DATA = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with serving() as server:
        server.files["/a.tar"] = DATA
        yield server


def fetch(path: str, partial: Path, timeout: float = 5.0, limit: int | None = None) -> Meter:
    meter = Meter(limit)
    FETCHERS[scheme_of(path)](path, partial, timeout, meter)
    return meter


@pytest.mark.parametrize(
    ("path", "scheme", "text"),
    [
        ("data/0.tar?", "", "data/0.tar?"),
        ("s3://bucket/0.tar", "s3", "s3://bucket/0.tar"),
        ("https://me:secret@host/0.tar?X-Amz-Signature=secret", "https", "https://host/0.tar"),
        ("pipe:curl -H 'Bearer secret' host", "pipe", "pipe:..."),
    ],
)
def test_messages_show_no_secret(path: str, scheme: str, text: str) -> None:
    assert (scheme_of(path), shown(path)) == (scheme, text)


def test_http_announces_its_size(tmp_path: Path, server: FaultyServer) -> None:
    pytest.importorskip("aiohttp")
    assert fetch(f"http://{server.address}/a.tar", tmp_path / "a").size == len(DATA)
    assert (tmp_path / "a").read_bytes() == DATA


def test_the_time_out_is_of_silence_not_of_the_transfer(tmp_path: Path, server: FaultyServer) -> None:
    pytest.importorskip("aiohttp")
    server.faults["/a.tar"] = [trickle, stall]
    fetch(f"http://{server.address}/a.tar", tmp_path / "a", timeout=1.2)  # takes 1.6 s
    assert (tmp_path / "a").read_bytes() == DATA
    with pytest.raises(TimeoutError):
        fetch(f"http://{server.address}/a.tar", tmp_path / "a", timeout=1.2)


@pytest.mark.parametrize(
    ("code", "reason"), [(401, DENIED), (403, DENIED), (404, NOT_FOUND), (410, NOT_FOUND), (429, None), (503, None)]
)
def test_what_another_attempt_would_meet_again(
    tmp_path: Path, server: FaultyServer, code: int, reason: str | None
) -> None:
    pytest.importorskip("aiohttp")
    server.faults["/a.tar"] = [status(code)]
    with pytest.raises(Exception) as caught:  # of several libraries
        fetch(f"http://{server.address}/a.tar", tmp_path / "a")
    assert final_reason(caught.value) == reason


def test_what_is_too_large_is_not_fetched(tmp_path: Path, server: FaultyServer) -> None:
    pytest.importorskip("aiohttp")
    fetch(f"http://{server.address}/a.tar", tmp_path / "a", limit=len(DATA))
    with pytest.raises(BadSample, match="too large"):
        fetch(f"http://{server.address}/a.tar", tmp_path / "a", limit=len(DATA) - 1)


def test_gs_comes_from_gcsfs(tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    server.files["/download/storage/v1/b/bucket/o/a.tar"] = DATA
    assert fetch("gs://bucket/a.tar", tmp_path / "a").size == len(DATA)
    assert (tmp_path / "a").read_bytes() == DATA
    with pytest.raises(FileNotFoundError):
        fetch("gs://bucket/b.tar", tmp_path / "b")
    server.faults["/download/storage/v1/b/bucket/o/a.tar"] = [status(403)]
    with pytest.raises(OSError, match="Forbidden") as caught:
        fetch("gs://bucket/a.tar", tmp_path / "b")
    assert final_reason(caught.value) == DENIED


def test_a_process_forked_from_one_that_has_fetched(tmp_path: Path, server: FaultyServer) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://{server.address}/a.tar"
    fetch(url, tmp_path / "a")
    processes = [multiprocessing.get_context("fork").Process(target=fetch, args=(url, tmp_path / n)) for n in "bc"]
    for process in processes:
        process.start()
    fetch(url, tmp_path / "a")
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    fetch(url, tmp_path / "a")
    assert {(tmp_path / name).read_bytes() for name in "abc"} == {DATA}


def test_the_output_of_a_command(tmp_path: Path) -> None:
    fetch("pipe:echo one; cat; echo two", tmp_path / "a")  # there is nothing on the standard input
    assert (tmp_path / "a").read_text() == "one\ntwo\n"
    with pytest.raises(ChildProcessError, match="exit status 3"):
        fetch("pipe:echo one; exit 3", tmp_path / "a")


@pytest.mark.parametrize("command", ["sleep 60 | cat", "exec >&-; sleep 60"])
def test_a_command_that_stalls_is_ended_with_all_it_started(tmp_path: Path, command: str) -> None:
    began = time.monotonic()
    with pytest.raises((TimeoutError, subprocess.TimeoutExpired)):
        fetch(f"pipe:{command}", tmp_path / "a", timeout=0.3)
    assert time.monotonic() - began < 50


def test_a_missing_package_is_named_with_the_command_that_brings_it() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["s3fs", "gcsfs", "aiohttp"]))  # None: as if not installed
from pathlib import Path
from ldm.data.remote import FETCHERS, Meter
for scheme in ("s3", "gs", "http", "https"):
    try:
        FETCHERS[scheme](f"{scheme}://bucket/a.tar", Path("a"), 1.0, Meter(None))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert [line.partition(" needs")[0] for line in done.stdout.splitlines()] == [
        "s3://",
        "gs://",
        "http://",
        "https://",
    ]
    assert [line.partition("pip ")[2] for line in done.stdout.splitlines()] == [
        f"install -e '.[{extra}]'" for extra in ("s3", "gcs", "http", "http")
    ]
